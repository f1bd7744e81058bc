"""Published names, families and sizes."""

import pytest
from refusal import refused

from ig_jax.models import cost, dit, zoo

# Parameters in millions that the papers print for the plain networks (without an intermediate head).
PRINTED = {"SiT-S/2": 33, "SiT-B/2": 130, "SiT-L/2": 458, "SiT-XL/2": 675, "DiT-XL/2": 675, "LightningDiT-XL/1": 675}


@pytest.mark.parametrize("name", PRINTED)
def test_a_published_name_has_the_printed_number_of_parameters(name):
    entries = zoo.named(name) | dict(inter_depth=())
    size = dict(input_size=16, channels=32) if name.startswith("Lightning") else dict(input_size=32, channels=4)
    rest = dict(num_classes=1000, dtype="float32", scan_blocks=False, remat="none")
    assert cost.parameter_count(dit.DiTConfig(**entries, **size, **rest)) / 1e6 == pytest.approx(
        PRINTED[name], rel=0.01
    )


@pytest.mark.parametrize("name", ["SiT-XL", "SiT-XXL/2", "SiT-S/3", "UNet-S/2", "SiT-1p0B/2", ""])
def test_other_names_are_refused(name):
    with refused("model name", name, expected="family-size/patch"):
        zoo.named(name)


def test_an_unknown_family_or_size_is_refused():
    with refused("family", "unet", expected="sit, dit, lightningdit"):
        zoo.settings("unet", "S")
    with refused("size", "XXL", expected="S, B, L, XL"):
        zoo.settings("sit", "XXL")
