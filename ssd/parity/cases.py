"""Everything that `ssd verify parity` compares, in the order of its table."""

from ssd.parity import (
    frozen_teachers,
    layer_targets,
    mask_statistics,
    masked_parts,
    masked_trajectories,
    parts,
    trajectories,
)
from ssd.parity.compare import Case

ROUNDING = 5e-6
"""Of a few dozen float32 operations on numbers of order 1 to 50."""
TWENTY_STEPS = 2e-5
"""Of forward, backward and optimiser, twenty times: Adam divides by the size of gradients, and so enlarges their rounding."""
SAMPLING = 0.0065
"""Of shares over 65,536 crops, half of them masked, against those of another sampler's 24,000 masked ones: three deviations of
the least certain, the share of masked crops."""
FORMULA = 1e-8
"""Of Python's own numbers, as many digits as are recorded."""
EXACT = 0.0

CASES = (
    Case("random numbers of places", EXACT, parts.random_numbers),
    Case("cross-entropy between views", ROUNDING, parts.cross_entropy_of_views),
    Case("cross-entropy of tokens", ROUNDING, parts.cross_entropy_of_tokens),
    Case("divergence", ROUNDING, parts.divergences),
    Case("entropy", ROUNDING, parts.entropies),
    Case("KoLeo", ROUNDING, parts.koleo_of_groups),
    Case("Gram", ROUNDING, parts.gram),
    Case("patches on another grid", ROUNDING, parts.resized),
    Case("centring", ROUNDING, parts.centring),
    Case("Sinkhorn-Knopp", ROUNDING, parts.sinkhorn),
    Case("Sinkhorn-Knopp with padding", ROUNDING, parts.padded_sinkhorn),
    Case("prototype head, weight norm", ROUNDING, parts.head_with_weight_norm),
    Case("prototype head, plain", ROUNDING, parts.plain_head),
    Case("head of pictures and patches", ROUNDING, parts.patch_head),
    Case("linear schedules", FORMULA, parts.linear_schedules, rounds=False),
    Case("cosine schedules", FORMULA, parts.cosine_schedules, rounds=False),
    Case("parameter groups, DINO and iBOT", FORMULA, parts.groups_of_dino, rounds=False),
    Case("parameter groups, DINOv2 and DINOv3", FORMULA, parts.groups_of_dinov2, rounds=False),
    Case("learning rates of batches", FORMULA, parts.rates_of_batches, rounds=False),
    Case("clipping", ROUNDING, parts.clipping),
    Case("optimisers", ROUNDING, parts.optimisers),
    Case("teacher average", ROUNDING, parts.teacher_average),
    Case("masks, blocks (iBOT)", SAMPLING, mask_statistics.blocks, rounds=False),
    Case("masks, scattered (iBOT)", SAMPLING, mask_statistics.scattered, rounds=False),
    Case("masks, even blocks (DINOv2)", SAMPLING, mask_statistics.even_blocks, rounds=False),
    Case("masks, filled blocks (DINOv3)", SAMPLING, mask_statistics.filled_blocks, rounds=False),
    Case("masks, filled blocks, counts", EXACT, mask_statistics.filled_counts),
    Case("masks, inverse blocks (CAPI)", SAMPLING, mask_statistics.inverse_blocks, rounds=False),
    Case("masks, inverse blocks, counts", EXACT, mask_statistics.inverse_counts),
    Case("masks, random (MAE)", SAMPLING, masked_parts.random_masks, rounds=False),
    Case("masks, random, visible counts", EXACT, masked_parts.visible_counts),
    Case("features of a target", ROUNDING, masked_parts.features),
    Case("pixels of a target", ROUNDING, masked_parts.pixels),
    Case("distances of features", ROUNDING, masked_parts.distances),
    Case("mean over hidden patches", ROUNDING, masked_parts.over_hidden),
    Case("fixed positions", ROUNDING, masked_parts.positions),
    Case("masked decoder", ROUNDING, masked_parts.decoder),
    Case("DINO, 20 steps", TWENTY_STEPS, trajectories.dino),
    Case("iBOT, 20 steps", TWENTY_STEPS, trajectories.ibot),
    Case("DINOv2, centring, one head, 20 steps", TWENTY_STEPS, trajectories.dinov2_centring),
    Case("DINOv2, Sinkhorn, own heads, 20 steps", TWENTY_STEPS, trajectories.dinov2_sinkhorn),
    Case("DINOv3 with Gram, 20 steps", TWENTY_STEPS, trajectories.dinov3),
    Case("Franca, 20 steps", TWENTY_STEPS, trajectories.franca),
    Case("RandomTeacher, 20 steps", TWENTY_STEPS, trajectories.random_teacher),
    Case("MAE, 20 steps", TWENTY_STEPS, masked_trajectories.mae),
    Case("dBOT of two stages, 20 steps", TWENTY_STEPS, masked_trajectories.dbot),
    Case("DMAE, 20 steps", TWENTY_STEPS, masked_trajectories.dmae),
    Case("further pretraining of two stages, 20 steps", TWENTY_STEPS, masked_trajectories.further_pretraining),
    Case("normalised layers", ROUNDING, layer_targets.normalised),
    Case("convolutional decoder", ROUNDING, layer_targets.conv_decoder),
    Case("masks, inverse squares (data2vec 2.0)", SAMPLING, layer_targets.squares, rounds=False),
    Case("masks, inverse squares, visible counts", EXACT, layer_targets.visible_counts),
    Case("data2vec, 20 steps", TWENTY_STEPS, layer_targets.data2vec),
    Case("data2vec 2.0, 20 steps", TWENTY_STEPS, layer_targets.data2vec2),
    Case("data2vec 2.0 with the published sum, 20 steps", TWENTY_STEPS, layer_targets.data2vec2_published_sum),
    Case("likeness (CKA)", ROUNDING, frozen_teachers.likeness),
    Case("course of a target block", EXACT, frozen_teachers.courses),
    Case("mixed pictures", ROUNDING, frozen_teachers.mixtures),
    Case("patches that stay", EXACT, frozen_teachers.redundancy),
    Case("relations of tokens", ROUNDING, frozen_teachers.relations),
    Case("LEAP, 20 steps", TWENTY_STEPS, frozen_teachers.leap),
    Case("LEAP with the published likeness, 20 steps", TWENTY_STEPS, frozen_teachers.leap_published_likeness),
    Case("LEAP's match of all blocks, 20 steps", TWENTY_STEPS, frozen_teachers.leap_all_blocks),
    Case("hybrid distillation, 20 steps", TWENTY_STEPS, frozen_teachers.hybrid),
    Case("hybrid distillation of values, 20 steps", TWENTY_STEPS, frozen_teachers.hybrid_values),
)
