"""Adam that takes the gradients of a SparcModel as the terms they are made of, and keeps the atoms at unit norm."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.model.sparse_ops import GradientTerm, compiled_ops, gpu_ops, sum_of, unit_norm_
from sparc_hf.training.arguments import SparcTrainingArguments


class SparcAdam(torch.optim.Adam):
    """Adam over all parameters of a model, whose step first brings the atoms to unit norm.

    The atoms' gradients lose their part along the atom, as in the earlier code (`SparcModel.prepare_atoms_for_step`).
    Gradients that the model gave as terms (`SparcModel.gradient_terms`) are used up by a step: with the compiled
    operators in one pass over parameter and moments, otherwise added up for one parameter after the other, so that
    there is never more than one gradient [N, d]. State and results are Adam's.

    Args:
        model: the model.
        lr: learning rate.
        beta2: decay of the second moment.
    """

    def __init__(self, model: SparcModel, lr: float, beta2: float = 0.999):
        super().__init__(model.parameters(), lr=lr, betas=(0.9, beta2), fused=True)
        self.model = model

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Make one step; `closure` must be None.

        Raises:
            ValueError: if a closure is given.
        """
        if closure is not None:
            raise ValueError("SparcAdam takes no closure; call it after `backward`")
        for name, terms in (self.model.gradient_terms or {}).items():
            if terms and compiled_ops(self.model.get_parameter(name)) is None:
                self._step_from_sum(name, terms)
            elif terms:
                self._step_from_terms(name, terms)
            terms.clear()
        for atoms in self.model.atoms.values():
            if atoms.grad is not None:
                unit_norm_(atoms, atoms.grad)
        super().step()

    def _step_from_sum(self, name: str, terms: list[GradientTerm]) -> None:
        """Step one parameter alone and drop its gradient, whose memory the next one's takes: fresh memory is slow."""
        parameter, group = self.model.get_parameter(name), self.param_groups[0]
        products = [product for term in terms if (product := term.products()) is not None]
        known = parameter.grad is None and len(products) == len(terms)
        _add_up(self.model, name, terms)
        if name.startswith("atoms."):
            unit_norm_(parameter, parameter.grad, sum_of(products) if known else None)
        everything, group["params"] = group["params"], [parameter]
        try:
            super().step()
        finally:
            group["params"] = everything
        parameter.grad = None

    def _step_from_terms(self, name: str, terms: list[GradientTerm]) -> None:
        parameter, group = self.model.get_parameter(name), self.param_groups[0]
        on_gpu = gpu_ops(parameter)
        state = self.state[parameter]
        if not state:
            device = parameter.device if on_gpu else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        moments = state["exp_avg"], state["exp_avg_sq"]
        coefficients = [term.coefficients.contiguous() for term in terms]
        rows = [term.rows.contiguous() for term in terms]
        orders, offsets = zip(*(term.selection.transposed for term in terms), strict=True)
        beta1, beta2 = group["betas"]
        biases = _biases_of(self.model, name)
        if on_gpu:
            if biases:
                biases[1].grad -= biases[0].grad @ parameter
            # The device counts the steps, so that nothing waits for it.
            factors = beta1, beta2, float(group["lr"]), group["eps"]
            on_gpu.adam_step(
                parameter, *moments, coefficients, rows, orders, offsets, state["step"], not biases, *factors
            )
            return
        steps = state["step"].item()
        sums = compiled_ops(parameter).adam_step(
            parameter,
            *moments,
            coefficients,
            rows,
            orders,
            offsets,
            [term.dots.contiguous() for term in terms if term.dots is not None],
            biases[0].grad if biases else parameter.new_empty(0),
            beta1,
            beta2,
            group["lr"] / (1 - beta1**steps),
            (1 - beta2**steps) ** -0.5,
            group["eps"],
        )
        if biases:
            biases[1].grad -= sums


class UsaeAdamW(torch.optim.AdamW):
    """AdamW of Universal Sparse Autoencoders: a group of parameters a stream, of which a step moves the source's only.

    Args:
        model: the model.
        lr: learning rate.
        weight_decay: as of AdamW.
        beta2: decay of the second moment.
    """

    def __init__(self, model: SparcModel, lr: float, weight_decay: float, beta2: float = 0.999):
        self.names = model.config.stream_names
        groups = {name: [] for name in self.names}
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[key.split(".")[1]].append(parameter)
        in_order = [{"params": groups[name]} for name in self.names]
        super().__init__(in_order, lr=lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)

    @contextlib.contextmanager
    def only(self, source: str) -> Iterator[None]:
        """Let the parameters of one stream alone ask for gradients, inside a `with` around forward and backward.

        The paper's code makes the gradients of all streams and uses the source's.
        """
        others = [
            parameter
            for name, group in zip(self.names, self.param_groups, strict=True)
            for parameter in (group["params"] if name != source else ())
        ]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)


def optimizer_of(args: SparcTrainingArguments, model: SparcModel) -> SparcAdam | UsaeAdamW:
    """Return the optimizer of a run: Adam with the objective's way of stepping."""
    if args.objective == "usae":
        return UsaeAdamW(model, args.learning_rate, args.weight_decay, args.adam_beta2)
    return SparcAdam(model, args.learning_rate, args.adam_beta2)


def add_up_terms(model: SparcModel) -> None:
    """Turn the gradient terms of a model into dense gradients, in `.grad`."""
    for name, terms in (model.gradient_terms or {}).items():
        _add_up(model, name, terms)
        terms.clear()


def _add_up(model: SparcModel, name: str, terms: list[GradientTerm]) -> None:
    parameter = model.get_parameter(name)
    for term in terms:
        dense = term.dense()
        parameter.grad = dense if parameter.grad is None else parameter.grad.add_(dense)
    if terms and (biases := _biases_of(model, name)):
        biases[1].grad -= biases[0].grad @ parameter


def _biases_of(model: SparcModel, parameter: str) -> Any:
    """Return the bias and the pre-bias that go with an encoder's weight; None for atoms."""
    room, stream, *_ = parameter.split(".")
    encoder = room == "encoders"
    return (
        (model.get_parameter(f"encoders.{stream}.bias"), model.get_parameter(f"pre_bias.{stream}"))
        if encoder
        else None
    )
