"""Every field of an adapter's configuration is accounted for, or the adapter is refused.

A field that is skipped because nobody knew it is how an adapter is served with a silently wrong
answer. So a kind sorts the fields of its configuration into three groups, and one in no group is an
error unless it is null.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import AdapterCorrupt, AdapterUnsupported, shown

MAX_NAMES = 1024
"""Names in one field: each may be compared with the path of every tensor."""

PEFT_HARMLESS: Mapping[str, str] = MappingProxyType(
    {
        "peft_type": "chose the kind",
        "task_type": "modules are named by the tensors; a head of its own is in modules_to_save",
        "auto_mapping": "names the Python class of the base",
        "peft_version": "a note on who saved it",
        "base_model_name_or_path": "a note; whether the base fits is checked by names and shapes",
        "revision": "a note on the base",
        "inference_mode": "freezes parameters in training",
    }
)
"""Fields of every PEFT configuration, with the reason why they cannot change an answer."""


@dataclass(frozen=True, slots=True)
class FieldRules:
    """The fields of one kind's configuration.

    Attributes:
        implemented: Fields that the kind's code reads and checks itself.
        harmless: Fields that cannot change an answer, with the reason.
        refused: Fields that would, unless they are off (null, false or empty), with what to do.
    """

    implemented: frozenset[str]
    harmless: Mapping[str, str]
    refused: Mapping[str, str]

    def check(self, config: Mapping[str, object]) -> None:
        """Raise AdapterUnsupported for the first field that is refused or unknown."""
        for name, value in config.items():
            if name in self.refused:
                if not _is_off(value):
                    raise AdapterUnsupported(
                        f"the config field {name!r} is not served ({shown(value)}): "
                        f"{self.refused[name]}"
                    )
            elif name not in self.implemented and name not in self.harmless and value is not None:
                raise AdapterUnsupported(
                    f"the config field {shown(name)} is not known ({shown(value)}), and it may "
                    f"change what the adapter computes: remove it if it does not"
                )


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def positive_int(name: str, value: object) -> int:
    """The value of the field as a positive integer, or AdapterCorrupt."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterCorrupt(f"the config field {shown(name)} is {shown(value)}, not a count")
    return value


def count_or_zero(name: str, value: object) -> int:
    """The value of the field as an integer from 0 on, or AdapterCorrupt."""
    return 0 if value == 0 and not isinstance(value, bool) else positive_int(name, value)


def name_list(name: str, value: object, limit: int = MAX_NAMES) -> tuple[str, ...]:
    """The value of the field as a list of names, empty where it is null.

    Raises:
        AdapterCorrupt: It is something else, or a name is empty.
        AdapterUnsupported: There are more than ``limit``.
    """
    listed = [] if value is None else value
    if not isinstance(listed, list) or not all(isinstance(each, str) and each for each in listed):
        raise AdapterCorrupt(f"the config field {name!r} is {shown(value)}, not a list of names")
    if len(listed) > limit:
        raise AdapterUnsupported(f"the config field {name!r} holds more than {limit} names")
    return tuple(listed)


def finite_number(name: str, value: object) -> float:
    """The value of the field as a number below 1e9 in size, or AdapterCorrupt."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise AdapterCorrupt(f"the config field {shown(name)} is {shown(value)}, not a sane number")
    return float(value)


def flag(name: str, value: object) -> bool:
    """The value of the field as a boolean, or AdapterCorrupt."""
    if not isinstance(value, bool):
        raise AdapterCorrupt(f"the config field {name!r} is {shown(value)}, not true or false")
    return value
