"""Every field explains itself, and illegal values are refused by name."""

import pytest
from pydantic import ValidationError

from shardline.router.router_config import RouterConfig


def test_every_field_has_a_description_a_default_and_a_range():
    for name, field in RouterConfig.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name
        assert len(field.metadata) == 2, f"{name} needs a lower and an upper bound"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"max_kk": 5}, "max_kk"),
        ({"max_k": 0}, "max_k"),
        ({"max_k": 2049}, "max_k"),
        ({"max_k": 50}, "default_k = 100 is above max_k = 50"),
        ({"max_timeout_ms": 100}, "default_timeout_ms = 500.0 is above max_timeout_ms"),
        ({"backoff_base_ms": 3000}, "backoff_base_ms"),
        ({"max_batch": 0}, "max_batch"),
        ({"default_min_coverage": 1.5}, "default_min_coverage"),
    ],
)
def test_illegal_values_are_refused_by_name(change, complaint):
    with pytest.raises(ValidationError, match=complaint):
        RouterConfig(**change)
