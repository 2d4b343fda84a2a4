"""What terms say of detail that is misplaced, over what they say of detail that is gone."""
import math

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d

from losses import TERMS
from study import shift


def test_the_ratio_of_mse_is_that_of_the_autocorrelation_of_the_detail_of_noise():
    x = 0.1 * torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    detail = -np.outer([1, 2, 1], [1, 2, 1]) / 16
    detail[1, 1] += 1  # the filter whose output is an image less its blur
    correlation = correlate2d(detail, detail)  # its middle is at (2, 2)
    ratios = {row[0]: row[3] for row in shift.rows(x)}
    assert ratios["mse"] == pytest.approx(2 * (1 - correlation[3, 3] / correlation[2, 2]), rel=0.05)


def test_pixel_and_structural_terms_ask_for_a_blur_and_statistics_do_not():
    x = torch.nn.functional.interpolate(torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), (32, 32))
    ratios = {row[0]: row[3] for row in shift.rows(2 * x - 1)}
    assert set(ratios) == set(TERMS)
    assert min(ratios[name] for name in ("mse", "l1", "ssim", "root-ssim")) > 1
    assert max(ratios[name] for name in ("contrast", "gradient-variance", "log-spectrum", "patch-swd")) < 1


def test_terms_that_grey_images_have_not_are_left_out():
    names = {row[0] for row in shift.rows(torch.rand(2, 1, 32, 32) * 2 - 1)}
    assert set(TERMS) - names == {"chroma", "coarse-chroma", "vsi"}
    grey = (torch.randint(3, (2, 1, 32, 32)) - 1.).expand(-1, 3, -1, -1)  # stored in colour: no error of chroma
    assert any(row[0] == "coarse-chroma" and math.isnan(row[3]) for row in shift.rows(grey))
