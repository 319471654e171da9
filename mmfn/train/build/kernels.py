"""From a config to its table of ops, and to the one that a plan takes for it."""

from mmfn.ops import Ops, planned_table, table
from mmfn.ops.packages import machine_of, overlay
from mmfn.train.config.schema import Config, ModelSection


def build_ops(section: ModelSection) -> Ops:
    """The table of `model.kernels` under the packages of `model.kernel_packages`.

    Raises ValueError for a table that this machine cannot have, and for a package that it cannot use.
    """
    made = table(section.table)
    return overlay(made, section.kernel_packages, machine_of(section.kind)) if section.kernel_packages else made


def planned_ops(config: Config) -> Ops:
    """The same of a plan, whose machine may have neither the device nor the packages."""
    made = planned_table(config.model.table, is_compiled=config.train.compile != "none")
    return overlay(made, config.model.kernel_packages, None)
