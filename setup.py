"""The description of the package: README.md, with links that work outside of the repository.

The address of the project is written in pyproject.toml, [project.urls]. Without one the README's
relative links stay as they are. Everything else about the package is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

FOLDER = Path(__file__).resolve().parent


def address(pyproject: str) -> str | None:
    """The value of `Repository` in [project.urls], or None."""
    found = re.search(r'^Repository = "(.+?)/?"', pyproject, re.MULTILINE)
    return found.group(1) if found else None


def description(readme: str, repository: str | None) -> str:
    """The README with relative links led to the repository; an image wants the raw file."""
    if repository is None:
        return readme

    def absolute(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link.group()
        kind = "raw" if image else "blob"
        return f"{image}[{text}]({repository}/{kind}/HEAD/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, readme)


if __name__ == "__main__":
    setup(
        long_description=description(
            (FOLDER / "README.md").read_text(encoding="utf-8"),
            address((FOLDER / "pyproject.toml").read_text(encoding="utf-8")),
        ),
        long_description_content_type="text/markdown",
    )
