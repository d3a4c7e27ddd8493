"""Codes in {-1, 0, +1} in little memory: two bits each, or five to a byte.

Shape letters: O rows of codes, one per output, K codes per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

# codes per int32
WORD = 16
# codes per byte as digits of base 3: 3^5 = 243
DIGITS = 5


def pack_codes(codes: Tensor) -> Tensor:
    """Codes of two bits: bits 2 i and 2 i + 1 of word w are code 16 w + i of the row, plus 1.

    Parameters
    ----------
    codes : Tensor
        -1, 0 or +1, ``(O, K)``, of any dtype.

    Returns
    -------
    Tensor
        int32 ``(O, ceil(K / 16))``; codes beyond the row's end are 0.
    """
    shifts = 2 * torch.arange(WORD, device=codes.device)
    digits = _padded(codes, WORD).unflatten(1, (-1, WORD)).long() + 1
    words = (digits << shifts).sum(dim=2)
    # the highest bit of an int32 is its sign
    return (words - ((words >> 31) << 32)).to(torch.int32)


def unpack_codes(words: Tensor, length: int) -> Tensor:
    """The reverse of ``pack_codes``: int8 ``(O, K)`` of int32 ``(O, ceil(K / 16))``, for a length K.

    Raises
    ------
    ValueError
        If there are not as many words as the length needs.
    """
    if words.shape[1] != -(-length // WORD):
        raise ValueError(f"codes: {length} of them take {-(-length // WORD)} words, not {words.shape[1]}.")
    octets = words.contiguous().view(torch.uint8)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=words.device)
    codes = ((octets.unsqueeze(2) >> shifts) & 3).flatten(1).to(torch.int8) - 1
    return codes[:, :length]


def pack_base3(codes: Tensor) -> Tensor:
    """Codes as digits of base 3: byte b of a row holds ``sum_i (code 5 b + i, plus 1) * 3^i``.

    Parameters
    ----------
    codes : Tensor
        -1, 0 or +1, ``(O, K)``, of any dtype.

    Returns
    -------
    Tensor
        uint8 ``(O, ceil(K / 5))``; codes beyond the row's end are 0.
    """
    digits = _padded(codes, DIGITS).unflatten(1, (-1, DIGITS)).long() + 1
    return (digits * 3 ** torch.arange(DIGITS, device=codes.device)).sum(dim=2).to(torch.uint8)


def unpack_base3(octets: Tensor, length: int) -> Tensor:
    """The reverse of ``pack_base3``: int8 ``(O, K)`` of uint8 ``(O, ceil(K / 5))``, for a length K.

    Raises
    ------
    ValueError
        If there are not as many bytes as the length needs, or one of them is no five codes.
    """
    if octets.shape[1] != -(-length // DIGITS):
        raise ValueError(f"codes: {length} of them take {-(-length // DIGITS)} bytes, not {octets.shape[1]}.")
    if octets.numel() and int(octets.max()) >= 3**DIGITS:
        raise ValueError(f"codes: a byte of {int(octets.max())} is no {DIGITS} codes.")
    values = octets.long().unsqueeze(2) // 3 ** torch.arange(DIGITS, device=octets.device)
    return (values % 3 - 1).flatten(1)[:, :length].to(torch.int8)


def _padded(codes: Tensor, multiple: int) -> Tensor:
    missing = -codes.shape[1] % multiple
    return torch.nn.functional.pad(codes, (0, missing)) if missing else codes
