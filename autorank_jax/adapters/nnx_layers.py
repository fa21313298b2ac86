"""Flax NNX layers with an adapter: subclasses that a matched layer's class is swapped for.

`ADAPTED[type]` names the subclass, its `weight` the parameter that is adapted, and its static method `form(layer)` how
that is read as a matrix. Swapping the class of a layer keeps its path, its attributes and tied weights; wrapping it
would not.
"""

import functools
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax import lax

from autorank_jax.adapters.low_rank import (
    Form,
    attend_update,
    check_convolution,
    conv_form,
    conv_update,
    einsum_form,
    einsum_update,
    embed_form,
    embed_update,
    general_update,
    linear_form,
    linear_update,
    make_window,
)
from autorank_jax.models.convolution import convolve
from autorank_jax.types import Array


class Factor(nnx.Variable):
    """One factor of an adapter; its `note` is called whenever it is read."""

    def get_value(self, **options: Any) -> Any:
        """Return the array."""
        self.get_metadata()["note"]()
        return super().get_value(**options)


class AdaptedLinear(nnx.Linear):
    """`y = x W + b + (x A) B`."""

    weight = "kernel"
    lora_a: nnx.Variable
    lora_b: nnx.Variable

    @staticmethod
    def form(layer: nnx.Linear) -> Form:
        """Return the form of a kernel `(d_in, d_out)`."""
        return linear_form(layer.kernel.shape)

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Apply the layer to `(..., d_in)`."""
        outputs = super().__call__(inputs, *args, **kwargs)
        return outputs + linear_update(inputs, self.lora_a[...], self.lora_b[...]).astype(outputs.dtype)


class AdaptedLinearGeneral(nnx.LinearGeneral):
    """A linear layer over several axes; `d_in` and `d_out` are their products."""

    weight = "kernel"
    lora_a: nnx.Variable
    lora_b: nnx.Variable

    @staticmethod
    def form(layer: nnx.LinearGeneral) -> Form:
        """Return the form of a kernel `(*in_features, *out_features)`."""
        if layer.batch_axis:
            raise ValueError(
                f"expected a LinearGeneral without batch_axis, got {dict(layer.batch_axis)}: it holds one matrix per "
                "batch entry, leave it out"
            )
        return linear_form(layer.kernel.shape, len(layer.in_features))

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Apply the layer over its axes."""
        outputs = super().__call__(inputs, *args, **kwargs)
        update = general_update(inputs, self.lora_a[...], self.lora_b[...], self.axis, self.form(self))
        return outputs + update.astype(outputs.dtype)


class AdaptedEinsum(nnx.Einsum):
    """An einsum layer whose equation maps inputs through one matrix."""

    weight = "kernel"
    lora_a: nnx.Variable
    lora_b: nnx.Variable

    @staticmethod
    def form(layer: nnx.Einsum) -> Form:
        """Return the form that the equation gives the kernel."""
        return einsum_form(layer.einsum_str, layer.kernel.shape)

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Apply the layer's own equation: the adapter is made for it.

        Raises:
            ValueError: if another equation is given.
        """
        given = args[0] if args else kwargs.get("einsum_str")
        if given is not None and given.replace(" ", "") != self.einsum_str:
            raise ValueError(f"expected the adapted layer's own equation {self.einsum_str!r}, got {given!r}")
        outputs = super().__call__(inputs, *args, **kwargs)
        update = einsum_update(self.einsum_str, inputs, self.lora_a[...], self.lora_b[...], self.form(self))
        return outputs + update.astype(outputs.dtype)


class AdaptedConv(nnx.Conv):
    """A convolution whose update is a k×k convolution to `r` channels (A) and a 1×1 convolution (B)."""

    weight = "kernel"
    lora_a: nnx.Variable
    lora_b: nnx.Variable

    @property
    def conv_general_dilated(self) -> Any:
        """What the layer convolves with: its own function, or in place of JAX's the one with the faster gradient."""
        own = vars(self)["conv_general_dilated"]
        return convolve if own is lax.conv_general_dilated else own

    @conv_general_dilated.setter
    def conv_general_dilated(self, function: Any) -> None:
        vars(self)["conv_general_dilated"] = function

    @staticmethod
    def form(layer: nnx.Conv) -> Form:
        """Return the form of a kernel `(*window, c_in, c_out)`."""
        check_convolution(layer.feature_group_count, _sequence(layer.input_dilation), layer.mask)
        make_window(layer.kernel_size, layer.strides, layer.kernel_dilation, layer.padding)
        return conv_form(layer.kernel.shape)

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Apply the layer to `(..., *spatial, c_in)`."""
        outputs = super().__call__(inputs, *args, **kwargs)
        window = make_window(self.kernel_size, self.strides, self.kernel_dilation, self.padding)
        return outputs + conv_update(inputs, self.lora_a[...], self.lora_b[...], window).astype(outputs.dtype)


class AdaptedEmbed(nnx.Embed):
    """An embedding whose update is looked up (`A[ids] B`) and, where it is tied to the output, attended to."""

    weight = "embedding"
    lora_a: nnx.Variable
    lora_b: nnx.Variable

    @staticmethod
    def form(layer: nnx.Embed) -> Form:
        """Return the form of a table `(num_embeddings, features)`."""
        return embed_form(layer.embedding.shape)

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Look up `(...)` ids."""
        outputs = super().__call__(inputs, *args, **kwargs)
        return outputs + embed_update(inputs, self.lora_a[...], self.lora_b[...]).astype(outputs.dtype)

    def attend(self, query: Array, *args: Any, **kwargs: Any) -> Array:
        """Return logits over the entries for queries `(..., features)`."""
        outputs = super().attend(query, *args, **kwargs)
        return outputs + attend_update(query, self.lora_a[...], self.lora_b[...]).astype(outputs.dtype)


def _sequence(value: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    return value if value is None or isinstance(value, int) else tuple(value)


ADAPTED: dict[type, Any] = {
    nnx.Linear: AdaptedLinear,
    nnx.LinearGeneral: AdaptedLinearGeneral,
    nnx.Einsum: AdaptedEinsum,
    nnx.Conv: AdaptedConv,
    nnx.Embed: AdaptedEmbed,
}


@functools.cache
def adapted_class(kind: type, base: type) -> Any:
    """Return the class that a layer's is swapped for: that of its base, with whatever else a subclass has."""
    return ADAPTED[base] if kind is base else type(f"Adapted{kind.__name__}", (ADAPTED[base], kind), {})
