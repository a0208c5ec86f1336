"""The catalog's own parts of published models, against loops: Molmo's pooling has no copy in a library."""

import torch
import torch.nn.functional as F

from vlm_course.catalog.modules import HReducer, PooledProjection, WindowedResampler

CLOSE = {"rtol": 0, "atol": 1e-5}


@torch.no_grad()
def test_molmos_connector_is_the_loop(redraw):
    """Each 2 x 2 window: its mean asks, its four patches answer, and a gated feed-forward layer follows."""
    bridge = redraw(PooledProjection(vision_dim=6, pooled_dim=4, mlp_width=5, llm_dim=3, heads=2), 0.5)
    features = torch.randn(2, 16, 6)
    out = bridge(features)
    assert out.shape == (2, 4, 3)
    for b in range(2):
        grid = features[b].reshape(4, 4, 6)
        for place, (top, left) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
            window = grid[top : top + 2, left : left + 2].reshape(4, 6)
            q, k, v = bridge.to_q(window.mean(0)), bridge.to_k(window), bridge.to_v(window)
            heads = [(q[p] @ k[:, p].T / 2**0.5).softmax(0) @ v[:, p] for p in (slice(0, 2), slice(2, 4))]
            pooled = bridge.to_out(torch.cat(heads))
            expected = bridge.down(F.silu(bridge.gate(pooled)) * bridge.up(pooled))
            torch.testing.assert_close(out[b, place], expected, **CLOSE)


@torch.no_grad()
def test_textmonkeys_bridge_keeps_the_whole_pages_tokens(redraw):
    bridge = redraw(WindowedResampler(vision_dim=5, llm_dim=8, queries=4, keep=3), 0.3)
    features = torch.randn(3, 9, 5)  # two windows, and the whole page
    out = bridge(features)
    windows = bridge.windows(features)
    assert out.shape == (1, 3 + 4, 8)
    torch.testing.assert_close(out[:, 3:], windows[2:], **CLOSE)
    torch.testing.assert_close(out[:, :3], bridge.tokens(windows[:2].reshape(1, 8, 8)), **CLOSE)


def test_docowls_idle_norm_changes_nothing(redraw):
    bridge = redraw(HReducer(vision_dim=3, llm_dim=4), 0.3)
    features = torch.randn(1, 16, 3)
    out = bridge(features)
    with torch.no_grad():
        bridge.norm.weight.fill_(7)
    assert torch.equal(bridge(features), out)
