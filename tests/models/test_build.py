from __future__ import annotations

import pytest
import torch

from tribute.config import NoiseScheduleConfig, UNetConfig, load_preset
from tribute.errors import ConfigError
from tribute.models.build import build_noise_schedule, build_unet, count_parameters, reset_weights


def test_initial_weights_depend_on_the_seed_only(unet_config: UNetConfig) -> None:
    first = build_unet(unet_config, opt_seed=1).state_dict()
    torch.rand(5)
    second = build_unet(unet_config, opt_seed=1).state_dict()
    other = build_unet(unet_config, opt_seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_reset_weights_leaves_nothing_of_the_trained_network(unet_config: UNetConfig) -> None:
    def reset(value: float, opt_seed: int) -> dict[str, torch.Tensor]:
        model = build_unet(unet_config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        reset_weights(model, opt_seed)
        return model.state_dict()

    first, second, other = reset(7.0, 1), reset(-3.0, 1), reset(7.0, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])
    # The same law as a new network, layer by layer.
    for name, built in build_unet(unet_config, opt_seed=1).state_dict().items():
        if built.numel() > 200:
            assert float(first[name].std()) == pytest.approx(float(built.std()), rel=0.3), name


def test_building_and_resetting_leave_the_global_generator_alone(unet_config: UNetConfig) -> None:
    before = torch.get_rng_state()
    reset_weights(build_unet(unet_config), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_the_cifar_network_has_the_size_that_was_published() -> None:
    """35.7 million parameters: Ho et al. (2020), appendix B. The small one: 2.2 million."""
    with torch.device("meta"):
        assert count_parameters(build_unet(load_preset("cifar").unet, device="meta")) == 35_746_307
        assert count_parameters(build_unet(load_preset("cifar-small").unet, device="meta")) == pytest.approx(
            2.25e6, rel=0.01
        )


def test_an_impossible_architecture_is_a_setting_to_repair(unet_config: UNetConfig) -> None:
    for wrong in (
        unet_config.replace(norm_num_groups=3),
        unet_config.replace(block_out_channels=(8, 16, 16)),
        unet_config.replace(down_block_types=("DownBlock2D", "SidewaysBlock2D")),
    ):
        with pytest.raises(ConfigError, match="unet"):
            build_unet(wrong)


def test_noise_schedules_follow_their_formulas() -> None:
    """Ho et al. (2020): linear variances. Nichol and Dhariwal (2021), eq. 17: squared cosine."""
    n = 1000
    linear = build_noise_schedule(NoiseScheduleConfig())
    betas = torch.tensor([1e-4 + (0.02 - 1e-4) * t / (n - 1) for t in range(n)], dtype=torch.float64)
    torch.testing.assert_close(linear.alphas_cumprod.double(), torch.cumprod(1 - betas, 0), rtol=1e-4, atol=1e-7)
    cosine = build_noise_schedule(NoiseScheduleConfig(beta_schedule="squaredcos_cap_v2"))
    at = (torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008
    curve = torch.cos(at * torch.pi / 2) ** 2
    expected = torch.cumprod((curve[1:] / curve[:-1]).clamp(min=0.001), 0)
    torch.testing.assert_close(cosine.alphas_cumprod.double(), expected, rtol=1e-3, atol=1e-7)
