"""Differences that are sparse in the frequency domain (FourierFT, arXiv:2405.03003).

    y += w Re(ifft2(S)) x = w Re(ifft_out(S ifft_in(x))),

with S (out, in) real and sparse, stored by rows as in ``sparse``: two transforms and one sparse
product instead of an (out, in) matrix. A ``tables.CorrectLinear`` whose cells are ``sparse``'s.
"""

from ..sparse.op import Cell as Cell
