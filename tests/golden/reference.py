"""The kit's truth: backbone, adapters, side path, loss and AdamW in float64, one row of real tokens at a time, so no padding exists.

Written from the formulas (README: the side path, the adapters) and imports nothing of this repository. Gradients are autograd's.
Where the code is clever this file is plain: effective weights are materialised, sums over u <= t are products with a triangle
of ones, decoding and greedy search run the whole row again for every token.

Shapes: T tokens of one row, D hidden size, H heads, Dh head size, M slots, r memory width, V vocabulary.
`p` is a dict of float64 tensors by the names of the files: Hugging Face's for the backbone, PEFT's for the adapter, and
`model.layers.N.side_path.NAME`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
PEFT = "base_model.model."


# ------------------------------------------------------------------------------------------------------ backbone

def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def frequencies(config: dict[str, Any]) -> Tensor:
    """Rotary frequencies (Dh/2,); Llama-3's scaling stretches long wavelengths by `factor` and blends those between."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta, size = rope.get("rope_theta") or config["rope_theta"], config["head_dim"]
    freq = float(theta) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if rope.get("rope_type", "default") == "default":
        return freq
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wave = 2 * math.pi / freq
    smooth = (length / wave - low) / (high - low)
    blended = (1 - smooth) * freq / rope["factor"] + smooth * freq
    return torch.where(wave < length / high, freq, torch.where(wave > length / low, freq / rope["factor"], blended))


def rotate(x: Tensor, freq: Tensor) -> Tensor:
    """Rotary embedding of x (T,Dh): first half + i second half, times exp(i position frequency)."""
    a, b = x.chunk(2, -1)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * freq
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def effective_weight(p: Tensors, name: str, adapter: dict[str, Any] | None) -> Tensor:
    """W, or W + s B A, or for DoRA m (W + s B A) / ||W + s B A||_row with the norm detached; (out,in)."""
    weight, key = p[name + ".weight"], PEFT + name
    if adapter is None or key + ".lora_A.weight" not in p:
        return weight
    scale = adapter["alpha"] / (math.sqrt(adapter["rank"]) if adapter["kind"] == "rslora" else adapter["rank"])
    weight = weight + scale * p[key + ".lora_B.weight"] @ p[key + ".lora_A.weight"]
    if adapter["kind"] == "dora":
        weight = p[key + ".lora_magnitude_vector"][:, None] * weight / weight.norm(dim=1, keepdim=True).detach()
    return weight


def attention(p: Tensors, config: dict[str, Any], name: str, x: Tensor, adapter: dict[str, Any] | None) -> Tensor:
    """Causal attention over x (T,D), a head at a time; query head h reads key/value head h // (H / K)."""
    T, size, freq = len(x), config["head_dim"], frequencies(config)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = ((x @ effective_weight(p, f"{name}.{part}_proj", adapter).T).view(T, -1, size) for part in "qkv")
    if config["model_type"] == "qwen3":
        q, k = (rms(s, config["rms_norm_eps"]) * p[f"{name}.{part}_norm.weight"] for s, part in ((q, "q"), (k, "k")))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    out = []
    for h in range(heads):
        g = h // (heads // groups)
        score = rotate(q[:, h], freq) @ rotate(k[:, g], freq).T / math.sqrt(size)
        out.append(score.masked_fill(future, -math.inf).softmax(-1) @ v[:, g])
    return torch.cat(out, -1) @ effective_weight(p, f"{name}.o_proj", adapter).T


def mlp(p: Tensors, name: str, x: Tensor, adapter: dict[str, Any] | None) -> Tensor:
    """down(silu(gate x) * up x) of x (T,D)."""
    gate, up, down = (effective_weight(p, f"{name}.{part}_proj", adapter) for part in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def forward(p: Tensors, config: dict[str, Any], ids: list[int], adapter: dict[str, Any] | None = None,
            side: dict[str, Any] | None = None) -> tuple[Tensors, Tensors]:
    """One row -> ({embedding, layer.N, hidden (T,D), logits (T,V)}, {num.N (M,r), den.N (M)} after the row)."""
    h = p["model.embed_tokens.weight"][torch.tensor(ids)]
    inner, states = {"embedding": h}, {}
    for n in range(config["num_hidden_layers"]):
        name = f"model.layers.{n}"
        for site, part in (("attention", "input_layernorm"), ("block", "post_attention_layernorm")):
            x = rms(h, config["rms_norm_eps"]) * p[f"{name}.{part}.weight"]
            h = h + (attention(p, config, f"{name}.self_attn", x, adapter) if site == "attention" else mlp(p, f"{name}.mlp", x, adapter))
            if side and n in side["layers"] and side["site"] == site:
                out = side_path({key: p[f"{name}.side_path.{key}"] for key in side_names(side)}, side, h)
                h, states[f"num.{n}"], states[f"den.{n}"] = out["h_out"], out["num"], out["den"]
        inner[f"layer.{n}"] = h
    inner["hidden"] = rms(h, config["rms_norm_eps"]) * p["model.norm.weight"]
    head = p["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return inner | {"logits": inner["hidden"] @ head.T}, states


# ------------------------------------------------------------------------------------------------------ side path

def side_names(side: dict[str, Any]) -> list[str]:
    """Names of the side path's parameters under these settings."""
    names = ["slots", "w_key", "w_value", "w_query" if side["mixer"] == "attention" else "w_read", "w_out"]
    names += ["slot_mlp_in", "slot_mlp_out", "channel_mlp_in", "channel_mlp_out"] if side["mixer"] == "mlp" else []
    return names + (["w_gate", "b_gate"] if side["writeback"] == "gate" else [])


def scale_grad(x: Tensor, g: float) -> Tensor:
    """x, its gradient times g."""
    return g * x + (1 - g) * x.detach()


def side_path(w: Tensors, side: dict[str, Any], h: Tensor, num: Tensor | None = None, den: Tensor | None = None) -> Tensors:
    """h (T,D) and the sums so far -> every intermediate by name, h_out (T,D) and the sums num (M,r), den (M) after the row."""
    stream = scale_grad(h, side["trunk_grad_scale"])
    x, root = rms(stream), math.sqrt(side["width"])
    k, v = rms(x @ w["w_key"].T), x @ w["w_value"].T
    e = k @ rms(w["slots"]).T / root
    past = torch.ones(len(h), len(h), dtype=h.dtype).tril()  # 1 where u <= t
    nums = torch.einsum("tu,um,ur->tmr", past, e.exp(), v) + (0 if num is None else num)
    dens = torch.einsum("tu,um->tm", past, e.exp()) + (0 if den is None else den)
    z = nums / dens[:, :, None]
    y = remix(w, side["mixer"], x, z)
    delta = write_back(w, side, stream, x, y)
    return {"x": x, "k": k, "v": v, "e": e, "z": z, "y": y, "delta": delta, "h_out": h + scale_grad(delta, side["grad_scale"]),
            "num": nums[-1], "den": dens[-1]}


def remix(w: Tensors, mixer: str, x: Tensor, z: Tensor) -> Tensor:
    """Memory z (T,M,r) and tokens x (T,D) -> y (T,r)."""
    silu = torch.nn.functional.silu
    if mixer == "mlp":
        z = z + torch.einsum("mj,tjr->tmr", w["slot_mlp_out"], silu(torch.einsum("jn,tnr->tjr", w["slot_mlp_in"], z)))
        z = z + torch.einsum("cj,tmj->tmc", w["channel_mlp_out"], silu(torch.einsum("jd,tmd->tmj", w["channel_mlp_in"], z)))
    if mixer == "attention":
        score = torch.einsum("tr,tmr->tm", rms(x @ w["w_query"].T), rms(z)) / math.sqrt(z.shape[-1])
    else:
        score = x @ w["w_read"].T
    return torch.einsum("tm,tmr->tr", score.softmax(-1), z)


def write_back(w: Tensors, side: dict[str, Any], stream: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """y (T,r) -> delta (T,D)."""
    d = y @ w["w_out"].T
    if side["writeback"] == "gate":
        return torch.sigmoid(x @ w["w_gate"] + w["b_gate"])[:, None] * d
    if side["writeback"] == "bounded":
        return d * (side["bound"] * stream.norm(dim=-1) / d.norm(dim=-1)).clamp(max=1)[:, None]
    return d


# ------------------------------------------------------------------------------------------------------ training

def trainable(names: list[str], scope: str) -> list[str]:
    """Which of these parameters learn under the scope."""
    kind = lambda name: "side" if ".side_path." in name else "adapter" if name.startswith(PEFT) else "backbone"
    groups = {"joint": ("adapter", "side"), "talan": ("side",), "writeback": ("adapter",)}[scope]
    writing = ("w_out", "w_gate", "b_gate") if scope == "writeback" else ()
    return [name for name in names if kind(name) in groups or name.rsplit(".", 1)[-1] in writing]


def loss(p: Tensors, config: dict[str, Any], rows: list[tuple[list[int], list[int]]], adapter: dict[str, Any], side: dict[str, Any]) -> Tensor:
    """Cross-entropy of every supervised token but a row's first, summed over all rows, divided by their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, supervised in rows:
        log_p = forward(p, config, ids, adapter, side)[0]["logits"].log_softmax(-1)
        for t in range(1, len(ids)):
            if supervised[t]:
                total, count = total - log_p[t - 1, ids[t]], count + 1
    return total / count


def adamw(start: Tensor, grads: list[Tensor], lr: float, settings: dict[str, Any]) -> Tensor:
    """Where AdamW with decoupled weight decay takes a parameter after these gradients."""
    (b1, b2), p, m, v = settings["betas"], start, torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = (m / (1 - b1 ** t)) / ((v / (1 - b2 ** t)).sqrt() + settings["eps"])
        p = p - lr * settings["weight_decay"] * p - lr * step
    return p


def train(p: Tensors, names: list[str], settings: dict[str, Any], loss_of: Any) -> tuple[Tensor, dict[str, list[Tensor]], Tensors]:
    """AdamW steps on one batch: (first loss, gradients of every step by name, parameters after the last step)."""
    rate = {name: settings["lr"] * (settings["talan_lr_scale"] if ".side_path." in name else 1) for name in names}
    now, losses = dict(p), []
    grads: dict[str, list[Tensor]] = {name: [] for name in names}
    for _ in range(settings["steps"]):
        leaves = {name: now[name].detach().requires_grad_() for name in names}
        losses.append(loss_of({**now, **leaves}))
        for name, g in zip(names, torch.autograd.grad(losses[-1], list(leaves.values()))):
            grads[name].append(g)
            now[name] = adamw(p[name], grads[name], rate[name], settings)
    return losses[0].detach(), grads, {name: now[name] for name in names}


def greedy(p: Tensors, config: dict[str, Any], prompt: list[int], limit: int, stop: list[int], adapter: dict[str, Any] | None = None,
           side: dict[str, Any] | None = None) -> tuple[list[int], float]:
    """The likeliest continuation up to and with a stop id, and the smallest lead that a chosen logit had over the next."""
    out: list[int] = []
    lead = math.inf
    while len(out) < limit and not (out and out[-1] in stop):
        logits = forward(p, config, prompt + out, adapter, side)[0]["logits"][-1]
        best = logits.topk(2)
        out.append(int(best.indices[0]))
        lead = min(lead, float(best.values[0] - best.values[1]))
    return out, lead
