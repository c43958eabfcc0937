"""Build scimlora from settings.ini, the one place where nbdev and pip read what the package is."""
from configparser import ConfigParser
from pathlib import Path
from shlex import split

from setuptools import find_packages, setup

here = Path(__file__).parent
# nbdev writes `key = value`; a colon may stand inside a value, so only `=` delimits.
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

extras = {k.removeprefix("extras_"): split(v, posix=False) for k, v in cfg.items() if k.startswith("extras_")}
extras["dev"] = split(cfg["dev_requirements"], posix=False)

readme = here / "README.md"
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["scimlora", "scimlora.*"]),
    package_data={"scimlora": ["assets/**/*", "assets/*"]},
    install_requires=split(cfg["requirements"], posix=False),
    extras_require=extras,
    entry_points={
        "console_scripts": split(cfg["console_scripts"], posix=False),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
