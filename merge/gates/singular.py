"""The singular value decomposition of a router's inputs, from the smaller of their Gram matrices."""

from __future__ import annotations

import torch

# Of more tokens than a model is wide, about this many elements are in float64 at a time: 256 MB.
PIECE_ELEMENTS = 1 << 25


class Wide:
    """U S V', the singular value decomposition of root * x (n, H) with n <= H, by the eigenvectors U of its n x n Gram
    matrix. `s2` (r,) are the squares of the singular values."""

    def __init__(self, x: torch.Tensor, root: torch.Tensor) -> None:
        self.x = x.to(root) * root  # (n, H)
        self.s2, self.u = _eigen(self.x @ self.x.T)

    def left(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of U: (n_g, r)."""
        return self.u[rows]

    def from_left(self, c: torch.Tensor) -> torch.Tensor:
        """U c: (..., n, k) from (..., r, k)."""
        return self.u @ c

    def onto_left(self, y: torch.Tensor) -> torch.Tensor:
        """U' y: (r, k) from (n, k)."""
        return self.u.T @ y

    def to_right(self, c: torch.Tensor) -> torch.Tensor:
        """V S c: (H, ...) from (r, ...)."""
        return self.x.T @ (self.u @ c)

    def from_right(self, b: torch.Tensor) -> torch.Tensor:
        """S V' b: (r,) from (H,)."""
        return self.u.T @ (self.x @ b)

    def times(self, b: torch.Tensor) -> torch.Tensor:
        """U S V' b: (n,) from (H,)."""
        return self.x @ b


class Tall(Wide):
    """The same with n > H, by the eigenvectors V of the H x H Gram matrix. x stays where and as it is, and rows of it are
    weighted, in float64 and on the device, only while they are used."""

    def __init__(self, x: torch.Tensor, root: torch.Tensor) -> None:
        self.x, self.root = x, root
        step = max(1, PIECE_ELEMENTS // x.shape[1])
        self.pieces = [slice(start, start + step) for start in range(0, len(x), step)]
        gram = torch.zeros(x.shape[1], x.shape[1]).to(root)
        for piece in self.pieces:
            part = self._of(piece)
            gram.addmm_(part.T, part)
        self.s2, self.v = _eigen(gram)
        self.s = self.s2.sqrt()

    def _of(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Rows of root * x, on the device."""
        there = rows.to(self.x.device) if isinstance(rows, torch.Tensor) else rows
        return self.x[there].to(self.root) * self.root[rows]

    def left(self, rows: torch.Tensor) -> torch.Tensor:
        return self._of(rows) @ self.v / self.s

    def from_left(self, c: torch.Tensor) -> torch.Tensor:
        right = self.v @ (c / self.s[:, None])  # (..., H, k)
        return torch.cat([self._of(piece) @ right for piece in self.pieces], dim=-2)

    def onto_left(self, y: torch.Tensor) -> torch.Tensor:
        products = [self._of(piece).T @ y[piece] for piece in self.pieces]  # (H, k) each
        return self.v.T @ torch.stack(products).sum(0) / self.s[:, None]

    def to_right(self, c: torch.Tensor) -> torch.Tensor:
        return self.v @ (self.s.view(-1, *[1] * (c.dim() - 1)) * c)

    def from_right(self, b: torch.Tensor) -> torch.Tensor:
        return self.s * (self.v.T @ b)

    def times(self, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._of(piece) @ b for piece in self.pieces])


def decomposed(x: torch.Tensor, root: torch.Tensor) -> Wide:
    """The singular value decomposition of root * x, of x (n, H) and root (n, 1), in the dtype and on the device of `root`."""
    return Wide(x, root) if x.shape[0] <= x.shape[1] else Tall(x, root)


def _eigen(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eigenvalues (r,) of a Gram matrix that are not zero but for rounding, and their eigenvectors (., r)."""
    s2, vectors = torch.linalg.eigh(gram)
    kept = s2 > s2[-1].clamp(min=torch.finfo(gram.dtype).tiny) * 1e-12
    return s2[kept], vectors[:, kept]
