"""Sixty recipes that nobody means well with, by what they try. Each is a file's bytes."""

from __future__ import annotations

import yaml

MODEL = "lab/tiny"


def _recipe(**keys: object) -> bytes:
    """A good recipe with some keys made bad."""
    value: dict[str, object] = {
        "base_model": MODEL,
        "gate_mode": "random",
        "experts": [{"source_model": MODEL}, {"source_model": MODEL}],
    }
    return yaml.dump(value | keys, Dumper=_Plain, sort_keys=False, allow_unicode=True).encode()


class _Plain(yaml.SafeDumper):
    """Writes what stands twice twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _expert(**keys: object) -> bytes:
    return _recipe(experts=[{"source_model": MODEL} | keys, {"source_model": MODEL}])


def _release(**keys: object) -> bytes:
    return _recipe(release=keys)


MARKUP = "<img src=x onerror=alert(1)><script>alert(1)</script></details></table> @everyone #1 GH-1 me/recipes#1"
LINK = "[click](javascript:alert(1)) ![x](https://evil.example/track.png) https://evil.example www.evil.example"
SHELL = "$(touch owned) `touch owned`; touch owned && touch owned | touch owned > owned"
COMMAND = "x\n::error::owned\n::set-output name=matrix::owned\n::add-mask::a\n##[error]owned"
BIDI = "safe\u202egnp.exe\u2066 \u200b\u200e\ufeff"
BOMB_LINES = "\n".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "\n".join(
    f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)
)

HOSTILE: dict[str, bytes] = {
    # Bombs
    "alias bomb": f"base_model: {MODEL}\nk0: &a0 [x]\n{BOMB_LINES}\nexperts: *a9\n".encode(),
    "merge-key bomb": f"base_model: {MODEL}\n{MERGE_BOMB}\nexperts: [*a8]\n".encode(),
    "self reference": b"base_model: a/b\nexperts: &e [*e]\n",
    "deep lists": b"base_model: a/b\nexperts: " + b"[" * 100_000,
    "deep mappings": b"base_model: a/b\nexperts: " + b"{a: " * 50_000,
    "deep by indentation": b"base_model: a/b\nexperts:\n" + b"".join(b" " * n + b"- \n" for n in range(500)),
    "long line": b"base_model: " + b"a" * 250_000 + b"\nexperts: []\n",
    "too large": b"base_model: a/b\nexperts: []\n# " + b"x" * 2_000_000,
    "many keys": b"base_model: a/b\nexperts: []\n" + b"".join(b"k%d: 1\n" % n for n in range(25_000)),
    "many experts": _recipe(experts=[{"source_model": MODEL}] * 1024),
    "too many experts": _recipe(experts=[{"source_model": MODEL}] * 4000),
    "many missing sources": _recipe(experts=[{"source_model": f"no/where-{n}"} for n in range(200)]),
    "many prompts": _recipe(
        gate_mode="hidden", experts=[{"source_model": MODEL, "positive_prompts": ["x"] * 10_000}] * 2
    ),
    "long prompt": _recipe(
        gate_mode="hidden", experts=[{"source_model": MODEL, "positive_prompts": ["x " * 30_000]}] * 2
    ),
    "many quants": _release(quants=["Q8_0"] * 20_000),
    "many tags": _release(tags=["t"] * 20_000),
    "many documents": b"base_model: a/b\nexperts: []\n" + b"---\na: 1\n" * 20_000,
    "many anchors": b"base_model: a/b\nexperts: []\n" + b"".join(b"k%d: &a%d 1\n" % (n, n) for n in range(10_000)),
    "escapes": b'base_model: "' + b"\\x41" * 60_000 + b'"\nexperts: []\n',
    "folded scalar": b"base_model: a/b\nexperts: []\ncard: {description: >\n" + b"   x\n" * 50_000 + b"}\n",
    "similar names": _recipe(**{"gate_mod" + "e" * 5000: "hidden" * 5000}),
    # Giant and odd numbers
    "giant integer": b"base_model: a/b\nexperts: []\nexperts_per_token: " + b"9" * 100_000 + b"\n",
    "hexadecimal": b"base_model: a/b\nexperts: []\nexperts_per_token: 0x" + b"f" * 100_000 + b"\n",
    "sexagesimal": b"base_model: a/b\nexperts: []\nexperts_per_token: " + b"9:" * 40_000 + b"9\n",
    "infinity": _expert(noise_scale=float("inf")),
    "not a number": _expert(residual_scale=float("nan")),
    "giant exponent": b"base_model: a/b\nexperts: []\nrouter: {regularisation: 1e999999999}\n",
    "negative seed": _recipe(build={"seed": -(2**70)}),
    "zero experts per token": _recipe(experts_per_token=0),
    "many experts per token": _recipe(experts_per_token=10**9),
    # YAML that builds things
    "python object": b"base_model: !!python/object/apply:os.system ['touch owned']\nexperts: []\n",
    "python name": b"base_model: !!python/name:os.system\nexperts: []\n",
    "own tag": b"base_model: !include /etc/passwd\nexperts: []\n",
    "binary": b"base_model: !!binary aGVsbG8=\nexperts: []\n",
    "impossible date": b"base_model: 2024-99-99\nexperts: []\n",
    "keys that are lists": b"? [a, b]\n: 1\nbase_model: a/b\nexperts: []\n",
    "duplicate keys": b"base_model: a/b\nbase_model: c/d\nexperts: []\n",
    # Bytes
    "control characters": b"base_model: a\x00b\x1b[2J\nexperts: []\n",
    "escaped control characters": b'base_model: "a\\x1b[2J\\x07\\0/b"\nexperts: []\n',
    "not UTF-8": b"base_model: \xff\xfe\nexperts: []\n",
    "UTF-16": "base_model: a/b\nexperts: []\n".encode("utf-16"),
    "lone surrogates": b'base_model: "\\uD800"\nexperts: []\n',
    "right to left": _release(repo="me/x", tags=[BIDI], license=BIDI),
    "no-break names": _recipe(**{BIDI: BIDI}),
    # Paths
    "absolute path": _recipe(base_model="/etc"),
    "climbing path": _recipe(base_model="../../../../etc"),
    "home": _recipe(base_model="~root"),
    "path in a name": _recipe(base_model="lab/../../etc"),
    "revision that climbs": _recipe(base_model=f"{MODEL}@../../main"),
    "revision with a query": _recipe(base_model=f"{MODEL}@main?x=1#y"),
    "file address": _recipe(base_model="file:///etc/passwd"),
    "other host": _recipe(base_model="https://evil.example/x"),
    "prompts file outside": _expert(prompts_file="/etc/passwd"),
    "release that climbs": _release(repo="../../etc/passwd"),
    "option as a name": _recipe(base_model="--upload-pack=touch owned"),
    # Text for other readers
    "markup": _recipe(**{MARKUP: MARKUP}, gate_mode=MARKUP, card={"title": MARKUP, "description": MARKUP}),
    "links": _recipe(**{LINK: LINK}, architecture=LINK),
    "markup in a role": _release(repo="me/x", license=MARKUP, tags=[LINK]),
    "shell": _recipe(**{SHELL: SHELL}, base_model=SHELL, build={"runner": SHELL}),
    "workflow commands": _recipe(**{COMMAND: COMMAND}, gate_mode=COMMAND),
    "workflow expressions": _recipe(gate_mode="${{ github.token }}", build={"runner": "${{ secrets.HF_TOKEN }}"}),
    "templates": _release(repo="me/x", license="{{ 7*7 }}{% for x in ().__class__.__base__.__subclasses__() %}"),
    "format strings": _recipe(gate_mode="{0.__class__}{problem}%s%n", architecture="{key!r}"),
    "table breakers": _recipe(gate_mode="a | b\n| c |\n---\n```\n<!-- moerge preview -->", architecture="`` ` ``"),
}
