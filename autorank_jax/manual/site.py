"""From the sources to a site: lay out, run Sphinx, check the links."""

import html.parser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from autorank_jax.manual.pages import HERE, code_blocks, guides, linked
from autorank_jax.manual.reference import FRONT, gallery, known, reference

NOTEBOOK = """---
file_format: mystnb
kernelspec: {name: python3, display_name: Python 3, language: python}
language_info: {name: python, pygments_lexer: ipython3}
---
"""
STRICT = "get_config().InteractiveShell.system_raise_on_error = True  # a command that fails fails its block\n"
NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinxcontrib.bibtex")


class ManualError(RuntimeError):
    """A manual that cannot be built. The message is one line, or what Sphinx printed."""


def build(folder: str | Path, *, execute: bool = True) -> Path:
    """Build the manual.

    Args:
        folder: where the site goes.
        execute: run the blocks of the guides, each guide in a process of its own; a block that fails ends the build.

    Returns:
        The front page.

    Raises:
        ManualError: without the packages of the extra `docs`, for a folder with other things in it, or with what Sphinx
            printed where it failed or warned, or with the links that lead nowhere.
    """
    missing = [name for name in NEEDED if not _is_there(name)]
    if missing:
        raise ManualError(f"expected the packages {', '.join(missing)}, got none: pip install 'autorank-jax[docs]'")
    folder = Path(folder).expanduser().resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "objects.inv").is_file()):
        raise ManualError(f"expected a new folder or that of an earlier build, got {folder}, which holds other things")
    with tempfile.TemporaryDirectory() as temporary:
        work, site = sources(Path(temporary) / "sources"), Path(temporary) / "site"
        mode = ("-D", f"nb_execution_mode={'force' if execute else 'off'}")
        command = [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "--keep-going",
            "-q",
            "-j",
            "auto",
            *mode,
            str(work),
            str(site),
        ]
        here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # blocks call commands
        profile = Path(temporary) / "ipython" / "profile_default" / "ipython_config.py"
        profile.parent.mkdir(parents=True)
        profile.write_text(STRICT, encoding="utf-8")
        environment = os.environ | {"PYTHONHASHSEED": "0", "PATH": here, "IPYTHONDIR": str(profile.parents[1])}
        ran = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
        if ran.returncode:
            failed = [f"{path.stem}: {path.read_text(encoding='utf-8')}" for path in sorted(site.rglob("*.err.log"))]
            said = [line for line in (ran.stdout + ran.stderr).splitlines() if "[IPKernelApp] WARNING" not in line]
            raise ManualError("\n".join([*said, *failed]))
        broken = check_links(site)
        if broken:
            raise ManualError("links that lead nowhere: " + "; ".join(broken))
        shutil.rmtree(site / "_sources", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(site, folder, ignore=shutil.ignore_patterns(".doctrees", ".buildinfo"))
    return folder / "index.html"


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def sources(folder: Path) -> Path:
    """Copy the sources into a folder, with the pages of the reference and the pictures of the repository beside them.

    Args:
        folder: which does not exist.

    Returns:
        The folder.
    """
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("*.pyc", "__pycache__", "__init__.py", "__main__.py"))
    for name, text in reference().items():
        page = folder / "reference" / f"{name}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(text, encoding="utf-8")
    shutil.move(folder / "sphinx" / "conf.py", folder)
    for guide in guides():
        text = linked(guide.read_text(encoding="utf-8"), "\n".join(code_blocks(guide)), known())
        (folder / "guides" / guide.name).write_text(NOTEBOOK + text, encoding="utf-8")
    page_text, pictures = gallery(HERE.parents[1] / "benchmarks")
    (folder / "gallery.md").write_text(page_text, encoding="utf-8")
    (folder / "pictures").mkdir()
    for name, path in pictures.items():
        shutil.copy(path, folder / "pictures" / name)
    if FRONT not in pictures:  # in an installed package
        front = folder / "index.md"
        text = re.sub(r"```\{figure\}.*?```\n\n", "", front.read_text(encoding="utf-8"), flags=re.S)
        front.write_text(text, encoding="utf-8")
    return folder


class _Page(html.parser.HTMLParser):
    """The links of a page, and the places that links may lead to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.places |= {value for name in ("id", "name") if (value := found.get(name))}
        self.links += [value for name in ("href", "src") if (value := found.get(name)) and tag != "base"]


def check_links(site: Path) -> list[str]:
    """Return the links within a site that lead nowhere, as `page: link`.

    Args:
        site: folder of the built pages.
    """
    found = (path for path in site.rglob("*.html") if "_static" not in path.parts)  # there lie templates of the theme
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in found}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            if (
                path.relative_to(site).parts[0] == "_modules"
            ):  # [docs] of a name that its room exports: the page is right
                parts = parts._replace(fragment="")
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            if not target.exists() or (place and target in pages and place not in pages[target].places):
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken
