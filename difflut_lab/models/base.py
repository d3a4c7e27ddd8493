"""What the training loop may ask of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from difflut_lab.nodes import LUTNodes
from difflut_lab.ternary import TernaryLayer


class Model(nn.Module):
    """Base class of architectures: raw features in, class scores out.

    A model's options are the annotated keyword parameters of its ``__init__``. Beside them it may declare any of
    ``input_shape``, ``num_classes``, ``seed``, and the configuration groups that it is assembled from (``encoder``,
    ``layer``, ``node``, ``head``, ``layer_config``); a group that it does not declare is an error in the configuration.
    """

    @classmethod
    def resolve(
        cls, options: Mapping[str, Any], groups: Mapping[str, Any], num_classes: int | None = None
    ) -> dict[str, Any]:
        """Check the options against the groups, before any data is read, and complete them once the data is known.

        Parameters
        ----------
        options : mapping
            The model's own options.
        groups : mapping
            The validated configuration groups that the model takes.
        num_classes : int, optional
            Number of classes; None before the data is read.

        Returns
        -------
        dict
            The options that the model will be built with.

        Raises
        ------
        ConfigError
            If they do not fit together.
        """
        del groups, num_classes
        return dict(options)

    def calibrate(self, x: Tensor) -> None:
        """Fit whatever depends on the data and is not trained, such as an encoder's thresholds.

        Parameters
        ----------
        x : Tensor
            Normalised features of the training split, ``(S, *input_shape)``.
        """

    @property
    def counts(self) -> dict[str, int]:
        """How many ``tables`` and ``ternary_weights`` the network has, of each kind that it has any of."""
        tables = sum(module.num_nodes for module in self.modules() if isinstance(module, LUTNodes))
        ternary = [module for module in self.modules() if isinstance(module, TernaryLayer) and not module.is_float]
        found = {"tables": tables, "ternary_weights": sum(layer.weight.numel() for layer in ternary)}
        return {name: count for name, count in found.items() if count}
