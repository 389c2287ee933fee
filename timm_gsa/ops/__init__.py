"""Operations of the papers as functions on tensors; `use_backend` chooses what computes them, `explain` shows it.

Every operation has a plain form of torch operators, which runs on any device and under any transform. The table lists
the other forms: the reference is the textbook formulation; "-" means that the plain form serves.

equation                               function                     reference         CPU              Triton
-------------------------------------  ---------------------------  ----------------  ---------------  ----------------
GSA: Shen et al. 2020, arXiv 2010.03019, Figure 1                   gsa/reference.py  gsa/cpu.py       gsa/gpu.py
  content: softmax(key) value, query   content_attention            N x N map         -                yes
  column step by relative position     column_attention             one-hot tables    blocks of logits yes
  row step                             row_attention                one-hot tables    blocks of logits yes
  content + row step                   content_and_row_attention    sum of the two    blocks of logits yes
  whole module with a fixed norm       global_attention             the steps         inference        inference
  norm of the query (ours)             normalise_query              -                 -                -
SAN: Zhao et al. 2020, CVPR, sections 3.1 to 3.3                    san/reference.py  san/cpu.py       san/gpu.py
  sum over neighbours, eqs. 2 and 4    aggregation                  F.unfold, einsum  compiled only    yes
  pairwise gamma on q_i - k_j          difference_network           F.unfold, convs   by rows          yes
  the same, norm of a batch in gamma   normed_difference_network    F.unfold, convs   by rows          yes
  patchwise gamma on (q_i, k_j ...)    patch_network                F.unfold, conv    by rows          yes
  norms before gamma, pairwise         difference_moments           F.unfold          -                yes
  norms before gamma, patchwise        patch_moments                F.unfold          -                -
  relations and positions              subtraction, patch,          -                 -                -
                                       neighbourhood, coordinates
Prior attention: Tan et al. 2020, arXiv 2006.07872                  gaussian.py       gaussian.py
  Gaussian of distance                 gaussian_attention           N x N map         separable        -
sMLPNet: Tang et al. 2021, arXiv 2109.05422                         axial_mixing.py
  mixing along rows and columns        row_mixing, column_mixing    einsum            -                -

Layers have short cuts through several of these operations: `gsa.LAYER`, and `san.PAIRWISE`, `PAIRWISE_WEIGHTS`,
`PATCHWISE`, `PATCHWISE_WEIGHTS` and `STEM`. pooling.py holds the pools of the networks.
"""
from ._backend import explain, use_backend
from .axial_mixing import (
    column_mixing,
    column_mixing_reference,
    resize_mixing_bias,
    resize_mixing_matrix,
    row_mixing,
    row_mixing_reference,
)
from .gaussian import gaussian_attention, gaussian_attention_reference, gaussian_weight
from .gsa import (
    column_attention,
    content_and_row_attention,
    content_attention,
    global_attention,
    normalise_query,
    resize_relative_table,
    row_attention,
)
from .san import (
    aggregation,
    coordinates,
    difference_moments,
    difference_network,
    neighbourhood,
    normed_difference_network,
    patch,
    patch_moments,
    patch_network,
    reflect_pad,
    subtraction,
)

__all__ = [
    'aggregation',
    'column_attention',
    'column_mixing',
    'column_mixing_reference',
    'content_and_row_attention',
    'content_attention',
    'coordinates',
    'difference_moments',
    'difference_network',
    'explain',
    'gaussian_attention',
    'gaussian_attention_reference',
    'gaussian_weight',
    'global_attention',
    'neighbourhood',
    'normalise_query',
    'normed_difference_network',
    'patch',
    'patch_moments',
    'patch_network',
    'reflect_pad',
    'resize_mixing_bias',
    'resize_mixing_matrix',
    'resize_relative_table',
    'row_attention',
    'row_mixing',
    'row_mixing_reference',
    'subtraction',
    'use_backend',
]
