"""Attention in fp64, written out over an explicit mask: what every backend is measured against."""

import torch


def make_heads(lengths, batch, heads, size, *, dtype=torch.float32, device="cpu", seed=0):
    """Random query, key, value; `lengths` and `heads` are (queries, keys)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(lengths[0], batch, heads[0], size), *[(lengths[1], batch, heads[1], size)] * 2]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def make_ids(batch, length, documents, seed=0, device="cpu"):
    """Document ids [b, s] of about so many documents a sample; the first sample's last document has one token."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(batch, length, generator=generator) < documents / length
    begins[0, -1] = True
    return begins.cumsum(1).to(torch.int32).to(device)


def exact_attend(query, key, value, *, scale, causal, window=0, softcap=0.0, ids=None, kept=None):
    """[s, b, n, d] in fp64; `kept`: factors [b, n, s, s'] on the weights, those of dropout."""
    length, key_length, group = query.shape[0], key.shape[0], query.shape[2] // key.shape[2]
    key, value = (tensor.double().repeat_interleave(group, dim=2) for tensor in (key, value))
    logits = torch.einsum("sbnd,tbnd->bnst", query.double(), key) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    rows = torch.arange(length, device=query.device)[:, None] + key_length - length
    columns = torch.arange(key_length, device=query.device)[None, :]
    seen = torch.ones(length, key_length, dtype=torch.bool, device=query.device)
    if causal:
        seen = seen & (columns <= rows)
    if window:
        seen = seen & (columns > rows - window)
    seen = seen[None, None]
    if ids is not None:
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    weights = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    if kept is not None:
        weights = weights * kept
    return torch.einsum("bnst,tbnd->sbnd", weights, value)


def with_gradients(attend, tensors, **options):
    """The output and the gradients of query, key and value for a fixed random gradient of the output."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output = attend(*tensors, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad)]


def errors(backend, tensors, *, ids=None, **options):
    """Relative errors of the output and the three gradients of a backend without dropout."""
    documents = None if ids is None else backend.prepare_documents(ids)
    actual = with_gradients(backend.attend, tensors, documents=documents, dropout=0.0, **options)
    double = [tensor.detach().double() for tensor in tensors]
    expected = with_gradients(exact_attend, double, ids=ids, **options)
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    return [((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
