"""A few known molecules as graphs, written down as SMILES in Kekulé form."""

from __future__ import annotations

import re

#: Atoms that the SMILES below use: atomic number and usual valences.
ELEMENTS = {
    "H": (1, (1,)), "C": (6, (4,)), "N": (7, (3, 5)), "O": (8, (2,)), "F": (9, (1,)),
    "S": (16, (2, 4, 6)), "Cl": (17, (1,)), "Br": (35, (1,)),
}  # fmt: skip
_ORDERS = {"-": 1, "=": 2, "#": 3}


def read_smiles(smiles: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Atoms by symbol, and bonds; hydrogen atoms are made explicit.

    Reads organic atoms, bonds, branches and ring closures; no charges, isotopes, aromatic letters
    or stereochemistry.

    Raises:
        ValueError: another character.
    """
    atoms: list[str] = []
    bonds: list[tuple[int, int]] = []
    used_valences: list[int] = []  # bond orders spent at every atom
    last: int | None = None
    rings: dict[str, tuple[int, int]] = {}
    order, branches = 1, list[int | None]()

    def bind(a: int, b: int, order: int) -> None:
        bonds.append((a, b))
        used_valences[a] += order
        used_valences[b] += order

    for symbol in re.findall("Cl|Br|.", smiles):
        if symbol in ELEMENTS:
            atoms.append(symbol)
            used_valences.append(0)
            if last is not None:
                bind(last, len(atoms) - 1, order)
            last, order = len(atoms) - 1, 1
        elif symbol in _ORDERS:
            order = _ORDERS[symbol]
        elif symbol == "(":
            branches.append(last)
        elif symbol == ")":
            last = branches.pop()
        elif symbol.isdigit() and last is not None:
            if symbol in rings:
                partner, ring_order = rings.pop(symbol)
                bind(partner, last, max(order, ring_order))
            else:
                rings[symbol] = (last, order)
            order = 1
        else:
            raise ValueError(f"cannot read {symbol!r} in {smiles}")
    for a in range(len(used_valences)):
        valence = next(v for v in ELEMENTS[atoms[a]][1] if v >= used_valences[a])
        for _ in range(valence - used_valences[a]):
            bonds.append((a, len(atoms)))
            atoms.append("H")
    return atoms, bonds


#: Name and structure. The first three are known inhibitors of COX-2; aspirin and ibuprofen act on
#: it less selectively, caffeine does not.
MOLECULES = {
    "celecoxib": "CC1=CC=C(C=C1)C2=CC(=NN2C3=CC=C(C=C3)S(=O)(=O)N)C(F)(F)F",
    "rofecoxib": "CS(=O)(=O)C1=CC=C(C=C1)C2=C(C(=O)OC2)C3=CC=CC=C3",
    "valdecoxib": "CC1=C(C(=NO1)C2=CC=CC=C2)C3=CC=C(C=C3)S(=O)(=O)N",
    "SC-560, which spares COX-2": "COC1=CC=C(C=C1)N2C(=CC(=N2)C(F)(F)F)C3=CC=C(Cl)C=C3",
    "ibuprofen": "CC(C)CC1=CC=C(C=C1)C(C)C(=O)O",
    "aspirin": "CC(=O)OC1=CC=CC=C1C(=O)O",
    "caffeine": "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
}
