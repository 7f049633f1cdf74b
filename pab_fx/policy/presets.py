"""What methods with a signal were published with: a policy for each, with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .change import Change, ModulatedInput, Output
from .how import RatedResidual, Residual
from .policy import Policy
from .where import Blocks, Model


@dataclass(frozen=True)
class Preset:
    """A published setting.

    Args:
        policy: the setting.
        source: where it stands.
    """

    policy: Policy
    source: str


def _tea_cache(
    of: Any, coefficients: tuple[float, ...], threshold: float, warmup: int = 1, cooldown: int = 1
) -> Policy:
    rule = Change(of, threshold, accumulate=True, warmup=warmup, cooldown=cooldown, rescale=coefficients)
    return Policy(Blocks(), rule, Residual())


TEACACHE = "ali-vilab/TeaCache, "
READ, EMBEDDING = ModulatedInput(), Output("time_embedding")
WAN_EMBEDDING, WAN_SHIFTS = Output("condition_embedder.time_embedder"), Output("condition_embedder.time_proj")
DBCACHE = Change(Blocks(0, 8), 0.08, warmup=8)
EASYCACHE = Change(Model(), 0.05, accumulate=True, warmup=10, cooldown=1, share_decision=True, by_rate=True)

# fmt: off
PUBLISHED: Mapping[str, Preset] = {
    "first-block": Preset(
        Policy(Blocks(1), Change(Blocks(0, 1), 0.05), Residual()), "diffusers/hooks/first_block_cache.py"),
    "dbcache": Preset(Policy(Blocks(8), DBCACHE, Residual()), "vipshop/cache-dit, DBCacheConfig: F8B0"),
    "easycache-wan": Preset(
        Policy(Model(), EASYCACHE, RatedResidual()), "H-EmbodVis/EasyCache, EasyCache4Wan2.1/easycache_generate.py"),
    "teacache-flux": Preset(
        _tea_cache(READ, (4.98651651e2, -2.83781631e2, 5.58554382e1, -3.82021401, 2.64230861e-1), 0.6),
        TEACACHE + "TeaCache4FLUX/teacache_flux.py"),
    "teacache-hunyuan-video": Preset(
        _tea_cache(READ, (7.33226126e2, -4.01131952e2, 6.75869174e1, -3.149878, 9.61237896e-2), 0.15),
        TEACACHE + "TeaCache4HunyuanVideo/teacache_sample_video.py"),
    "teacache-ltx-video": Preset(
        _tea_cache(READ, (2.14700694e1, -1.28016453e1, 2.31279151, 7.92487521e-1, 9.69274326e-3), 0.05),
        TEACACHE + "TeaCache4LTX-Video/teacache_ltx.py"),
    "teacache-mochi": Preset(
        _tea_cache(READ, (-3.51241319e3, 8.11675948e2, -6.09400215e1, 2.42429681, 3.05291719e-3), 0.09),
        TEACACHE + "TeaCache4Mochi/teacache_mochi.py"),
    "teacache-lumina2": Preset(
        _tea_cache(READ, (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344), 0.3),
        TEACACHE + "TeaCache4Lumina2/teacache_lumina2.py"),
    "teacache-latte": Preset(
        _tea_cache(READ, (-2.46434137e3, 3.08044764e2, 8.07447667e1, -4.11385132, 1.11001402e-1), 0.1),
        TEACACHE + "eval/teacache/experiments/latte.py"),
    "teacache-cogvideox-2b": Preset(
        _tea_cache(EMBEDDING, (-3.10658903e1, 2.54732368e1, -5.92380459, 1.75769064, -3.61568434e-3), 0.1),
        TEACACHE + "eval/teacache/experiments/cogvideox.py"),
    "teacache-cogvideox-5b": Preset(
        _tea_cache(EMBEDDING, (-1.53880483e3, 8.43202495e2, -1.34363087e2, 7.97131516, -5.23162339e-2), 0.1),
        TEACACHE + "eval/teacache/experiments/cogvideox.py"),
    "teacache-wan2.1-t2v-1.3b": Preset(
        _tea_cache(WAN_EMBEDDING, (2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1), 0.08),
        TEACACHE + "TeaCache4Wan2.1/teacache_generate.py"),
    "teacache-wan2.1-t2v-14b": Preset(
        _tea_cache(WAN_EMBEDDING, (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404), 0.2),
        TEACACHE + "TeaCache4Wan2.1/teacache_generate.py"),
    "teacache-wan2.1-i2v-480p": Preset(
        _tea_cache(WAN_EMBEDDING, (-3.0233167e2, 2.23948934e2, -5.2546397e1, 5.8734844, -2.01973289e-1), 0.26),
        TEACACHE + "TeaCache4Wan2.1/teacache_generate.py"),
    "teacache-wan2.1-i2v-720p": Preset(
        _tea_cache(WAN_EMBEDDING, (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683), 0.3),
        TEACACHE + "TeaCache4Wan2.1/teacache_generate.py"),
    "teacache-wan2.1-t2v-1.3b-retained": Preset(
        _tea_cache(WAN_SHIFTS, (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2), 0.1, 5, 0),
        TEACACHE + "TeaCache4Wan2.1/teacache_generate.py, use_ret_steps"),
    "teacache-wan2.1-t2v-14b-retained": Preset(
        _tea_cache(WAN_SHIFTS, (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1), 0.2, 5, 0),
        TEACACHE + "TeaCache4Wan2.1/teacache_generate.py, use_ret_steps"),
}
"""By name. Thresholds are those that the sources set; of Latte and CogVideoX the slower, of Wan the faster of two."""
# fmt: on


def preset(name: str, threshold: float | None = None) -> Policy:
    """A method with a signal as it was published.

    Args:
        name: which: `PUBLISHED` lists them, with their sources.
        threshold: in place of the published one.

    Raises:
        ValueError: for an unknown name, and for a threshold that is no number >= 0.

    Example:
        >>> preset("teacache-flux", threshold=0.25).when.describe()
        'reused while the changes of the modulated input add up to at most 0.25'
    """
    if name not in PUBLISHED:
        raise ValueError(f"preset: name must be one of {', '.join(PUBLISHED)}, got {name!r}.")
    policy = PUBLISHED[name].policy
    rule: Any = policy.when
    return policy if threshold is None else replace(policy, when=replace(rule, threshold=threshold))
