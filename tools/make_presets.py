"""Write scimlora/assets/presets.tsv: known marker genes with their mean values in real cells, for the page's examples.

    python tools/make_presets.py        needs scimlora[demo] and the shared cells (SCIMLORA_DATA)
"""
import numpy as np
import pandas as pd

from scimlora.base import BASES
from scimlora.data import align_cells
from scimlora.examples import baron, shared

# Which genes: markers that textbooks and atlases agree on. Which values: the cells decide.
PANCREAS = {
    "beta": "INS IAPP MAFA PDX1 ADCYAP1 DLK1 PCSK1 G6PC2 SCD5 TIMP2 CHGA CHGB SCG5",
    "alpha": "GCG TTR ARX IRX2 LOXL4 TM4SF4 CRYBA2 GC PCSK2 FAP CHGA CHGB SCG5",
    "delta": "SST RBP4 HHEX LEPR PCSK1 BCHE CASR CHGA CHGB SCG5",
    "acinar": "PRSS1 CPA1 CPA2 CTRB1 CTRB2 CELA3A REG1A REG1B PNLIP CLPS SPINK1",
    "ductal": "KRT19 CFTR SPP1 MMP7 SLC4A4 ANXA4 KRT7 KRT8 KRT18 SERPING1 TACSTD2",
    "endothelial": "PECAM1 VWF PLVAP CD34 FLT1 KDR ESAM CDH5 RGCC ENG SPARC",
    "macrophage": "CD68 LYZ C1QA C1QB C1QC TYROBP FCER1G LAPTM5 CD74 APOE",
}
BLOOD = {
    "B": "CD19 MS4A1 CD79A CD79B CD37 CD74 HLA-DRA HLA-DPB1 TCL1A BANK1 LINC00926",
    "CD4 T": "CD3D CD3E CD3G IL7R LTB LDHB TCF7 LEF1 CD27 MAL NOSIP",
    "NK": "GNLY NKG7 PRF1 GZMB GZMA FGFBP2 SPON2 CST7 KLRD1 FCGR3A TYROBP",
    "CD14 Monocytes": "CD14 LYZ S100A8 S100A9 S100A12 FCN1 CST3 TYROBP MS4A6A LGALS2 CTSS",
    "CD8 T": "CD8A CD8B CD3D CD3E CD3G GZMK CCL5 KLRG1 CD2 IL32 LYAR DUSP2",
    "FCGR3A Monocytes": "FCGR3A MS4A7 LST1 CDKN1C RHOC IFITM3 AIF1 LYPD2 CTSL COTL1 TYROBP",
    "Dendritic": "FCER1A CLEC10A CD1C HLA-DPA1 HLA-DPB1 HLA-DRA HLA-DQA1 CD74 CST3 GPX1 SERPINF1",
    "Megakaryocytes": "PPBP PF4 GP9 ITGA2B TUBB1 GNG11 SDPR SPARC CLU TREML1 CMTM5",
}
BRAIN = {
    "neurons": "SNAP25 SYT1 STMN2 RBFOX3 GAD1 SLC17A7 NRGN CHGB UCHL1 ENO2 MAP1B",
    "astrocytes": "GFAP AQP4 SLC1A2 SLC1A3 ALDH1L1 GJA1 CLU CPE SPARCL1 S100B APOE",
    "oligodendrocytes": "MBP PLP1 MOG MAG MOBP CNP CLDND1 ERMN OPALIN TF CRYAB",
    "microglia": "C1QA C1QB C1QC CX3CR1 P2RY12 CSF1R AIF1 CD74 TYROBP FCER1G LAPTM5",
}
SHOWN = {"B": "B cell", "CD4 T": "CD4 T cell", "NK": "NK cell", "CD14 Monocytes": "CD14 monocyte",
         "CD8 T": "CD8 T cell", "FCGR3A Monocytes": "CD16 monocyte", "Dendritic": "dendritic cell", "Megakaryocytes": "platelet", "neurons": "neuron",
         "astrocytes": "astrocyte", "oligodendrocytes": "oligodendrocyte"}


def means(adata, markers, tissue, source):
    "Yield one row a marker: its mean log1p CP10K over the cells of the type, where it is expressed at all."
    wanted = sorted({g for text in markers.values() for g in text.split()})
    # Totals are over all genes that the file holds, so a marker's value is what it is in a whole cell.
    genes = list(dict.fromkeys([*wanted, *adata.var_names]))
    cells = align_cells(adata, genes)
    place = {g: i for i, g in enumerate(genes)}
    for name, text in markers.items():
        rows = (adata.obs.cell_type == name).to_numpy()
        mean = np.asarray(cells.X[rows].expm1().mean(0)).ravel()
        for g in text.split():
            value = round(float(np.log1p(mean[place[g]])), 2)
            if value > 0: yield dict(cell_type=SHOWN.get(name, name), tissue=tissue, gene=g, value=value, source=source)


def main():
    rows = [*means(baron(), PANCREAS, "pancreas", "Baron 2016, GSE84133"),
            *means(shared("pbmc_3k_10x"), BLOOD, "blood", "10x Genomics, 3k PBMC"),
            *means(shared("brain_darmanis2015"), BRAIN, "brain", "Darmanis 2015, GSE67835")]
    pd.DataFrame(rows).to_csv(BASES / "presets.tsv", sep="\t", index=False)


if __name__ == "__main__":
    main()
