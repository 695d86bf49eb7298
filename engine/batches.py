"""One capture for all batches: what is known of one forward on one kind of image, whatever the batch.

    1  the first batch gets a capture of its own, as quickly as ever
    2  another one, of 2 images or more, is captured with its batch as a symbol: a Template
    3  every batch that fits the template gets its program from it, in milliseconds

A batch of 1 always has a capture of its own, which is kept: PyTorch's symbols stand for 2 and more, as shapes
and strides follow other rules for 1.

The guards of a template say for which batches the forward goes the same way, as far as it asked PyTorch's
symbol. A forward may ask past it: isinstance(n, int) is false for a symbol. So a template counts only if it
gives, for some batch, the program that a capture of this batch alone gave.

A batch that no template fits, as the odd ones where the even ones go another way, may bring one more, up to
MAX_TEMPLATES. Where the symbol fails, each batch gets a capture of its own from then on.
"""

from __future__ import annotations

from types import MethodType

from torch import Tensor, nn

from .capture import capture, capture_batches
from .program import LEAST, Program, Template, Uncapturable

MAX_TEMPLATES = 4


class Family:
    """Holds names, sizes and operations, neither the model nor its tensors."""

    def __init__(self, dynamic: bool = True) -> None:
        self.single: Program | None = None  # for one image
        self.templates: list[Template] = []
        self.digests: dict[int, bytes] = {}  # of the programs that were captured for one batch
        self.dynamic = dynamic  # whether there may be more templates

    def knows(self, batch: int) -> bool:
        """Whether `program` will need no capture."""
        return self.single is not None if batch < LEAST else self._template(batch) is not None

    def program(self, model: nn.Module, plain: MethodType, x: Tensor) -> Program:
        """Raises Uncapturable."""
        batch = x.shape[0]
        if batch < LEAST:
            self.single = self.single or self._capture(model, plain, x)
            return self.single
        template = self._template(batch)
        if template is not None:
            return template.at(batch)
        if self._may_be_dynamic(batch):
            try:
                template = capture_batches(model, plain, x)
            except Uncapturable:  # the capture of this batch alone says why, where it fails, too
                self.dynamic = False
        own = None
        if template is not None and not self._confirmed(template, batch):
            own = self._capture(model, plain, x)
            template = template if self._confirmed(template, batch) else None
            self.dynamic = template is not None
        if template is not None:
            self.templates.append(template)
            return template.at(batch)
        return own or self._capture(model, plain, x)

    def _template(self, batch: int) -> Template | None:
        return next((one for one in self.templates if one.fits(batch)), None)

    def _may_be_dynamic(self, batch: int) -> bool:
        others = any(other != batch for other in self.digests)
        return self.dynamic and others and len(self.templates) < MAX_TEMPLATES

    def _confirmed(self, template: Template, batch: int) -> bool:
        return template.fits(batch) and any(
            template.numbers(other) is not None and template.at(other).digest() == digest
            for other, digest in self.digests.items()
        )

    def _capture(self, model: nn.Module, plain: MethodType, x: Tensor) -> Program:
        program = capture(model, plain, x)
        self.digests[x.shape[0]] = program.digest()
        return program
