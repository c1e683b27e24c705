"""What the processes of test_distributed.py run: functions of a module, since each process imports them by name."""

import contextlib
import gc
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# Workers are forked from a process that has imported everything once and has no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["autoregembed.train", "sentence_transformers"])


def _enter(connection, function, rank: int, world: int, folder: str, arguments) -> None:
    if world > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    import datasets

    datasets.config.HF_DATASETS_CACHE = f"{folder}/datasets"
    torch.set_num_threads(1)
    try:
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
        connection.send(("done", function(*arguments)))
    except BaseException as error:
        connection.send(("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    connection.close()
    os._exit(0)


def start(function, world: int, folder: Path, *arguments) -> list:
    """[(process, connection)] of `world` processes that run function(*arguments), joined by gloo."""
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(world):
        here, there = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_enter, args=(there, function, rank, world, str(folder), arguments), daemon=True
        )
        process.start()
        there.close()
        started.append((process, here))
    return started


def finish(started: list, seconds: float = 120) -> list:
    """What each process returned, or the text of its error; those that are not done in time are killed."""
    end = time.monotonic() + seconds
    results: list = []
    for process, connection in started:
        try:
            state = connection.recv() if connection.poll(max(0.0, end - time.monotonic())) else ("hung", "no answer")
        except EOFError:
            process.join(10)  # its end of the pipe closes before its status is known
            state = ("dead", f"exit status {process.exitcode}")
        results.append(state)
    for process, _ in started:
        process.kill()
        process.join()
    return results


def run(function, world: int, folder: Path, *arguments, seconds: float = 120) -> list:
    """What each of `world` processes returns from function(*arguments); fails where one fails or hangs."""
    results = finish(start(function, world, folder, *arguments), seconds)
    bad = [f"process {rank} {state}: {text}" for rank, (state, text) in enumerate(results) if state != "done"]
    assert not bad, "\n".join(bad)
    return [value for _, value in results]


# ----------------------------------------------------------------------------------------------------------------------


def _numpy(tensors: dict) -> dict:
    from autoregembed.distributed import to_full_tensor

    return {name: to_full_tensor(x.detach()).clone().numpy() for name, x in tensors.items()}


def fsdp(function, *arguments):
    """function(*arguments) with accelerate's FSDP2 on CPUs, which it does not offer.

    All but the choice of the backend is its own path.
    """
    from accelerate import DistributedType, PartialState
    from accelerate.state import AcceleratorState

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_TORCH_DEVICE": "cpu"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    torch.accelerator.is_available = lambda: True  # `cpu=` of Accelerator depends on it
    result = function(*arguments)
    assert AcceleratorState().distributed_type == DistributedType.FSDP
    return result


def hybrid(function, *arguments):
    """`fsdp` with shards over two processes each, and two copies of them, as accelerate's launcher asks for it."""
    os.environ |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    os.environ |= {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
    return fsdp(function, *arguments)


def filled(configs: list) -> None:
    """Every weight that processes read for their shards is that of the model loaded whole, also in fingerprints."""
    from autoregembed import build, distributed, files, loading, runtime, sharding

    for config in configs:
        accelerator = runtime.make_accelerator(config, "fp32")
        torch.manual_seed(0)
        whole = build.build_models(config)[:2]
        torch.manual_seed(0)
        with loading.in_parts():
            models = build.build_models(config)[:2]
        optimizer = build.placeholder_optimizer(models[0], config)
        sharding.shard_models(accelerator, *models, optimizer)
        for found, wanted in zip(models, whole, strict=True):
            expected = dict(wanted.named_parameters())
            assert [n for n, _ in found.named_parameters()] == [*expected]
            for name, parameter in found.named_parameters():
                mesh = parameter.device_mesh
                assert parameter.to_local().numel() <= -(-len(parameter) // mesh.size(-1)) * expected[name][:1].numel()
                assert torch.equal(distributed.to_full_tensor(parameter.detach()), expected[name].detach()), name
                rows = [*distributed.pieces(parameter)]
                assert dist.get_rank() > 0 or torch.equal(torch.cat(rows), expected[name].detach())
            for name, buffer in wanted.named_buffers():
                assert torch.equal(found.get_buffer(name), buffer), name
        assert sharding.shared_fingerprint(*models) == files.weights_fingerprint(*whole)
        tokens = [[5, 6, 7], [8]]
        with torch.no_grad():
            z = models[0].eval()(tokens)
            torch.testing.assert_close(z, whole[0].eval()(tokens))
            torch.testing.assert_close(models[1].logprob(z, tokens), whole[1].logprob(z, tokens))


def dying_reader(config, victim: int) -> None:
    """A run in which one process is killed while it reads its weights."""
    from rich.console import Console

    from autoregembed import train, weight_files

    read = weight_files.WeightFiles.rows

    def killed(self, *arguments):
        killed.calls += 1
        if killed.calls == 5 and dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, *arguments)

    killed.calls = 0
    weight_files.WeightFiles.rows = killed
    train.train(config, Console(quiet=True))


def one_run(case: dict) -> tuple[dict, list[str]]:
    """The summary of a training run, and the files and folders that this process wrote."""
    from rich.console import Console

    from autoregembed import train
    from autoregembed.config import Config

    written: list[str] = []
    parent = Path(case["output_dir"]).parent

    def audit(event: str, arguments) -> None:
        writes = event in ("os.rename", "os.mkdir") or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes:
            path = Path(os.fsdecode(arguments[event == "os.rename"]))  # safetensors' files show when they are renamed
            if path.is_relative_to(parent):
                written.append(str(path.relative_to(parent)))

    sys.addaudithook(audit)
    return train.train(Config(**case), Console(quiet=True)), written


def several_runs(cases: list[dict]) -> list[dict]:
    """The summaries of training runs one after the other."""
    return [one_run(case)[0] for case in cases]


def sharded_decoder() -> None:
    """Scores and gradients of a decoder whose weights are shared out are those of a whole one, and nothing stays."""
    from autoregembed import Decoder, linear_logprob
    from autoregembed.testing import tiny_model

    for architecture, tied in (("llama", False), ("llama", True), ("gpt_neox", False)):
        whole, shared = (
            Decoder(tiny_model(architecture, vocab_size=321, dtype=torch.float64, tie_word_embeddings=tied))
            for _ in range(2)
        )
        size = sum(8 * p.numel() for p in shared.parameters())
        shared.shard(torch.device("cpu"))
        held = sum(p.to_local().untyped_storage().nbytes() for p in shared.parameters())
        assert held < 0.6 * size, (held, size)
        z = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
        targets = [[5, 6, 7], [8], [9, 9]]
        found = []
        for decoder in (whole, shared):
            leaf = z.clone().requires_grad_()
            scores = decoder.logprob(leaf, targets)
            (gradient,) = torch.autograd.grad((scores * torch.tensor([1.0, -2.0, 0.5])).sum(), leaf)
            found.append((scores, gradient))
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
        del leaf, scores, gradient
        gc.collect()
        kinds = (torch.Tensor, torch.nn.Parameter)
        tables = sum(type(x) in kinds and x.shape == (321, 32) for x in gc.get_objects())
        assert tables == 2 - tied, f"{architecture}: got {tables} tables of V rows, expected those of `whole`"
    head = shared.model.get_output_embeddings().weight
    hidden, target = torch.randn(4, 32, dtype=torch.float64), torch.tensor([0, 320, 7, 7])
    expected = linear_logprob(hidden, whole.model.get_output_embeddings().weight, target)
    torch.testing.assert_close(linear_logprob(hidden, head, target), expected)
    with pytest.raises(TypeError, match="weight: got a DTensor that requires grad"):
        linear_logprob(hidden, head.detach().requires_grad_(), target)


def shared_shards() -> None:
    """A decoder on the shards of an encoder scores as a whole one, and its graph holds no whole weight."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard

    from autoregembed import Decoder, Encoder
    from autoregembed.testing import tiny_model

    for architecture, kind, name in (
        ("llama", "LlamaDecoderLayer", "gate_proj"),
        ("gpt_neox", "GPTNeoXLayer", "dense"),
    ):
        sizes = {"vocab_size": 321, "intermediate_size": 72, "dtype": torch.float64}
        whole = Decoder(tiny_model(architecture, **sizes))
        wrapped = get_peft_model(tiny_model(architecture, **sizes), LoraConfig(r=2, target_modules=[name]))
        encoder = Encoder(wrapped, compress_token_ids=[317, 318], own_compress_rows=True)
        shared = Decoder.sharing(encoder)
        for module in [m for m in encoder.modules() if type(m).__name__ == kind]:
            fully_shard(module)
        fully_shard(encoder)
        shared.shard(torch.device("cpu"))
        local = {p.to_local().untyped_storage().data_ptr() for p in encoder.parameters()}
        assert {p.to_local().untyped_storage().data_ptr() for p in shared.parameters()} < local
        z = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
        found = []
        for decoder in (whole, shared):
            leaf = z.clone().requires_grad_()
            scores = decoder.logprob(leaf, [[5, 6, 7], [8], [9, 9]])
            gc.collect()
            kinds = (torch.Tensor, torch.nn.Parameter)
            alive = sum(type(x) in kinds and 72 in x.shape and 32 in x.shape for x in gc.get_objects())
            (gradient,) = torch.autograd.grad((scores * torch.tensor([1.0, -2.0, 0.5])).sum(), leaf)
            found.append((scores.detach(), gradient))
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
        layers = {"llama": 6, "gpt_neox": 4}[architecture]
        assert alive == layers, f"{architecture}: got {alive} weights of an MLP, expected the {layers} of `whole`"


def sharded_passes() -> None:
    """Stage 2 in passes through shared-out weights: processes with other rows make as many, and gradients are whole."""
    from autoregembed import Decoder
    from autoregembed.config import Stage2Options
    from autoregembed.objective import stage2_loss
    from autoregembed.testing import tiny_model

    rank = dist.get_rank()
    rows = [{"target_ids": [[5 + i, 6, 7], *([8 + j, 9] for j in range(1 + 2 * rank))]} for i in range(2 + rank)]
    options = Stage2Options(ref_margin="none")
    generator = torch.Generator().manual_seed(rank)
    z = torch.randn(2 * len(rows), 5, 32, dtype=torch.float64, generator=generator)
    make = lambda **how: Decoder(tiny_model("gpt_neox", dtype=torch.float64), **how)  # noqa: E731
    whole, found = make(share_prefixes=False), []
    ways = {"share_prefixes": True, "gradient_checkpointing": True}, {"gradient_checkpointing": "selective"}
    for how in ({}, *ways):
        shared = make(**how)
        shared.shard(torch.device("cpu"))
        for budget in (30, 45, 1000):  # pairs apart, rows apart, one pass
            found.append((shared, budget))
    for decoder, budget in [(whole, None), *found]:
        leaf = z.clone().requires_grad_()
        loss = stage2_loss(options, decoder, leaf, rows, token_budget=budget).alignment
        (gradient,) = torch.autograd.grad(loss, leaf)
        if decoder is whole:
            wanted = loss.detach(), gradient
        torch.testing.assert_close((loss.detach(), gradient), wanted, rtol=0, atol=1e-10)


def gathered_rows() -> None:
    """Ragged rows, none from one process; the gradient of each row is the sum of what all processes ask of it."""
    from autoregembed.distributed import gather_rows

    rank, counts = dist.get_rank(), [2, 0, 3, 1]
    everything = torch.arange(12.0).reshape(6, 2)
    first = sum(counts[:rank])
    x = everything[first : first + counts[rank]].clone().requires_grad_()
    rows, place = gather_rows(x)
    assert place == first
    assert torch.equal(rows, everything)
    ((rank + 1) * everything * rows).sum().backward()
    assert torch.equal(x.grad, 10 * everything[first : first + counts[rank]])


def shared_embeddings(case: dict) -> None:
    """Seven texts of which three processes embed a share each; the last round has work for one of them."""
    from autoregembed import build
    from autoregembed.config import Config

    encoder = build.build_models(Config(**case))[0]
    texts = ["the cat sat", "on a mat", "while rain", "fell", "over old stone bridges", "and boats", "drifted past"]
    alone = encoder.encode(texts, token_budget=1)
    torch.testing.assert_close(encoder.encode(texts, token_budget=1, shared=True), alone, rtol=0, atol=1e-6)


def dying(case: dict, victim: int) -> None:
    """A run in which one process is killed in its third step."""
    from rich.console import Console

    from autoregembed import train
    from autoregembed.config import Config
    from autoregembed.objective import Objective

    step = Objective.__call__

    def killed(self, rows):
        killed.calls += 1
        if killed.calls == 3 and dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, rows)

    killed.calls = 0
    Objective.__call__ = killed
    train.train(Config(**case), Console(quiet=True))


def stopped(case: dict, receiver: int) -> str:
    """A run in which one process gets SIGTERM in its third step; the message with which it stops."""
    from rich.console import Console

    from autoregembed import train
    from autoregembed.config import Config
    from autoregembed.objective import Objective

    step = Objective.__call__

    def signalled(self, rows):
        signalled.calls += 1
        if signalled.calls == 3 and dist.get_rank() == receiver:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, rows)

    signalled.calls = 0
    Objective.__call__ = signalled
    try:
        train.train(Config(**case), Console(quiet=True))
    except train.Interrupted as stop:
        return str(stop)
    return ""


def refused(case: dict) -> str:
    """The error of a run."""
    from rich.console import Console

    from autoregembed import train
    from autoregembed.config import Config

    try:
        train.train(Config(**case), Console(quiet=True))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def one_step(cases: list[dict]) -> list[dict]:
    """One optimiser step in float64 for each case, its batch cut into equal shares of consecutive rows."""
    from autoregembed import build, data, distributed, loading, runtime, sharding
    from autoregembed.config import Config
    from autoregembed.objective import Objective, encoder_lengths, loss_counts
    from autoregembed.packing import make_microbatches
    from autoregembed.prompt import Prompt
    from autoregembed.reference_scores import compute_ref_logps

    found = []
    for case in cases:
        config = Config(**case)
        accelerator = runtime.make_accelerator(config, "fp32")
        assert accelerator.num_processes == distributed.world_size() == int(os.environ.get("WORLD_SIZE", "1"))
        torch.manual_seed(0)  # of the adapters, whatever cases came before
        with loading.in_parts() if accelerator.is_fsdp2 else contextlib.nullcontext():
            encoder, decoder, tokenizer, _ = build.build_models(config)
        prompt = Prompt(tokenizer, encoder.num_compress_tokens, encoder.bos_token_id, config.instruction)
        rows = (data.compression_rows if config.stage == 1 else data.alignment_rows)(
            data.load_rows(config.train_data), prompt
        )
        encoder.double()
        if decoder is not None:
            decoder.double()
        if accelerator.is_fsdp2:
            assert all(p.is_meta for n, p in encoder.named_parameters() if n != "compress_rows" and "lora" not in n)
            optimizer = build.placeholder_optimizer(encoder, config)
            wrapped, optimizer = sharding.shard_models(accelerator, encoder, decoder, optimizer)
            build.fill_optimizer(optimizer.optimizer, encoder, config)
        else:
            wrapped, optimizer = accelerator.prepare(encoder, build.create_optimizer(encoder, config))
        reference = compute_ref_logps(encoder.eval(), decoder, rows, 64) if config.needs_ref_logps else None
        encoder.train()
        objective = Objective(config, wrapped, decoder, accelerator, reference)
        size = config.batch_size // distributed.world_size()
        first = distributed.rank() * size
        batch = [{**rows[i], "row": i} for i in range(first, first + size)]
        log = {name: x.item() for name, x in objective(batch).items()}
        gradients = _numpy({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm or math.inf)
        optimizer.step()
        found.append(
            {
                "log": log,
                "gradients": gradients,
                "norm": float(distributed.to_full_tensor(norm)),
                "parameters": _numpy(dict(encoder.named_parameters())),
                "parts": len(
                    make_microbatches(encoder_lengths(batch, encoder, config.hard_negatives), config.token_budget)
                ),
                "counts": loss_counts(config, batch),
                "reference": None if reference is None else [r.numpy() for r in reference],
            }
        )
    return found
