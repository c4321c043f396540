"""Write docs/findings.md: `python -m merge.findings > docs/findings.md`."""

from merge.findings import documentation

print(documentation(), end="")
