"""What the site of these pages needs beyond `mkdocs.yml`: they are written for GitHub, where links may leave docs/."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    **{name: name.lower() for name in ("CHANGELOG.md", "CONTRIBUTING.md")},
    **{name: f"{name}.txt" for name in ("LICENSE",)},
    **{path.relative_to(ROOT).as_posix(): f"deploy/{path.name}.txt" for path in sorted((ROOT / "deploy").iterdir())},
}
"""File of the checkout -> where it is on the site. As text, so that a browser shows it."""
LINK = re.compile(r"(\]\()([^)#\s]+)")


def on_files(files, config):
    """Adds what pages link to outside of docs/."""
    for name, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fences and links as the site has them."""
    homes = {place: name for name, place in OUTSIDE.items()}
    home = posixpath.dirname(homes.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def follow(link):
        target = posixpath.normpath(posixpath.join(home, link[2]))
        place = OUTSIDE.get(target, target.removeprefix("docs/"))
        if re.match(r"[a-z]+:", link[2]) or not (target in OUTSIDE or target.startswith("docs/")):
            return link[0]
        return link[1] + posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(follow, re.sub(r"^```bash test$", "```bash", markdown, flags=re.MULTILINE))
