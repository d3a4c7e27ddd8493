"""Registered data sets: tensors in memory, split once into training, validation and test parts."""

from difflut_lab.data import cifar10, digits, npz, vision
from difflut_lab.data.base import DataSet, DataSource, Split, stratified_indices, stratified_split

__all__ = [
    "DataSet",
    "DataSource",
    "Split",
    "cifar10",
    "digits",
    "npz",
    "stratified_indices",
    "stratified_split",
    "vision",
]
