"""The `quire` command. A user's mistake is one line on stderr and an exit code, never a traceback.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Every command imports what it needs when it runs: talking
to a server must not wait for Ray or torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import click

if TYPE_CHECKING:
    from quire.cluster.client import Client
    from quire.cluster.config import EngineConfig, ServeConfig
    from quire.protos import generation_pb2 as pb

Decorator: TypeAlias = Callable[[Any], Any]

URL = "127.0.0.1:50051"
_INTERRUPTED = 130


class _Parsed(click.ParamType[int]):
    """A size as people write it: 8k, 512M, 2GiB."""

    def __init__(self, name: str, parser: str) -> None:
        self.name = name
        self._parser = parser

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        from quire.cluster import sizes

        parse: Callable[[str], int] = getattr(sizes, self._parser)
        try:
            return parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


COUNT = _Parsed("tokens", "parse_count")
BYTES = _Parsed("bytes", "parse_bytes")


def option(*names: str, **settings: Any) -> Decorator:
    """An option that the environment can set too: QUIRE_ and its name, whatever the command."""
    variable = "QUIRE_" + names[0].removeprefix("--").split("/")[0].replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_default=settings.get("default") is not None, **settings)


def options(*decorators: Decorator) -> Decorator:
    """Several options as one, in the order in which help shows them."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        from quire.cluster.config import version

        click.echo(f"quire {version()}")
        ctx.exit()


def _refuse_remote_code(_ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        raise click.UsageError(
            "--trust-remote-code is not supported: Python code that comes with a model is never run;"
            " serve a model of a built-in architecture"
        )


engine_options = options(
    option("--tensor-parallel-size", "-tp", type=int, default=1, help="Ranks that share the model."),
    option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
           help="Of weights and KV cache; auto: the model's own."),
    option("--kv-cache-dtype", type=click.Choice(["auto", "fp8"]), default="auto",
           help="fp8 (e4m3) holds twice the tokens of a 16-bit cache; auto: as --dtype."),
    option("--max-model-len", type=COUNT, help="Longest sequence: 4096, 8k, 1K.  [default: the model's]"),
    option("--block-size", type=int, default=16, help="Tokens of a KV block."),
    option("--gpu-memory-utilization", type=float, default=0.9, help="Share of a GPU's memory to use."),
    option("--kv-cache-memory-bytes", type=BYTES, help="Size of each rank's KV pool: 512M, 2GiB.  [default: measured]"),
    option("--num-gpu-blocks-override", type=int, help="Exact number of KV blocks."),
    option("--max-num-seqs", type=int, help="Sequences that run at once.  [default: 256 on a GPU, 64 on a CPU]"),
    option("--max-num-batched-tokens", type=COUNT,
           help="Tokens of the largest step.  [default: 2048 on a GPU, 512 on a CPU]"),
    option("--swap-space", type=float,
           help="GiB of host memory per rank for what is preempted.  [default: 4 on a GPU, 0 on a CPU]"),
    option("--preemption-mode", type=click.Choice(["auto", "swap", "recompute"]), default="auto",
           help="What becomes of the KV of a preempted request; auto: what takes less time."),
    option("--enable-prefix-caching/--no-enable-prefix-caching", default=True,
           help="Compute what several prompts begin with once."),
    option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto: a GPU if there is one."),
    option("--deterministic", is_flag=True,
           help="A request's output is the same to the last bit whatever runs beside it."),
    option("--enforce-eager", is_flag=True, help="No CUDA graphs: less memory, slower steps."),
)  # fmt: skip

url_option = option("--url", default=URL, metavar="HOST:PORT", help="The server.")

sampling_options = options(
    option("--max-tokens", type=int, help="Output tokens at most.  [default: as many as fit]"),
    option("--temperature", type=float, help="0 takes the likeliest token always.  [default: 1]"),
    option("--top-p", type=float, help="Sample from the smallest set of this probability."),
    option("--top-k", type=int, help="Sample from the k likeliest tokens."),
    option("--seed", type=int, help="Same seed, same output."),
    option("--best-of", type=int, help="Make so many samples; answer with those of the highest mean log-probability."),
    option("--beam-width", type=int, help="Beam search with so many candidates, instead of sampling."),
    option("--length-penalty", type=float, help="Of beam search: above 0 favours long answers.  [default: 1]"),
    option("--early-stopping", type=click.Choice(["true", "false", "never"]),
           help="Beam search ends with enough answers; when no better is likely; or possible.  [default: false]"),
    option("--cache-salt", help="Share what is computed only with requests of the same salt."),
    option("--stop", multiple=True, help="End before this text; may be given several times."),
    option("--timeout", type=float, help="Seconds for each answer at most."),
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def cli() -> None:
    """Serve large language models from a paged KV cache, and talk to them."""


@cli.command()
@click.argument("model", required=False)
@engine_options
@options(
    option("--run-ahead", type=int, default=1, help="Steps sent ahead of the one that is awaited; 0: none."),
    option("--max-num-waiting", type=int, help="Sequences that may wait.  [default: 8 x running]"),
    option("--seed", type=int, default=0, help="Seed of dummy weights."),
    option("--served-model-name", multiple=True, help="Name for clients; several may be given.  [default: MODEL]"),
    option("--load-format", type=click.Choice(["auto", "dummy"]), default="auto", help="dummy: random weights."),
    option("--host", default="127.0.0.1", help="Address to listen on."),
    option("--grpc-port", type=int, default=50051, help="0: any free port."),
    click.option("--address", envvar=["QUIRE_ADDRESS", "RAY_ADDRESS"], metavar="HOST:PORT",
                 help="Ray cluster to join.  [default: a local one is started]"),
    option("--step-timeout", type=float, help="Seconds after which a step counts as hung.  [default: by device]"),
    option("--drain-timeout", type=float, default=60.0, help="Seconds to finish open requests after a signal."),
    option("--reserve-prefix", multiple=True, metavar="FILE",
           help="Keep what many prompts begin with: a file of text, or JSON that says more; may be given several times."),
    option("--enable-admin/--no-enable-admin", default=None,
           help="Let this port reserve and release prefixes.  [default: if only this machine reaches it]"),
    click.option("--trust-remote-code", is_flag=True, hidden=True, expose_value=False, callback=_refuse_remote_code),
)  # fmt: skip
def serve(
    served_model_name: tuple[str, ...],
    host: str,
    grpc_port: int,
    address: str | None,
    step_timeout: float | None,
    drain_timeout: float,
    reserve_prefix: tuple[str, ...],
    enable_admin: bool | None,
    **engine: Any,
) -> int:
    """Serve MODEL: a folder in Hugging Face's format. Without MODEL: the small one that comes with Quire."""
    from quire.cluster.config import ServeConfig
    from quire.cluster.laps import process_started
    from quire.cluster.prefixes import read_prefix

    process_started()  # before a fork, so that what follows counts from here
    with _mistakes():
        config = ServeConfig(
            engine=_engine_config(**engine),
            served_model_names=served_model_name,
            host=host,
            grpc_port=grpc_port,
            address=address,
            step_timeout=step_timeout,
            drain_timeout=drain_timeout,
            reserved_prefixes=tuple(map(read_prefix, reserve_prefix)),
            enable_admin=enable_admin,
        )
        _check_model(config.engine)
    from quire.cluster import fate

    return fate.in_own_session(lambda: _launch(config))


@cli.command()
@click.argument("model", required=False)
@engine_options
@option("--gpu-memory", type=BYTES, help="Memory of one GPU: 80GiB. Plans for GPUs wherever it runs.")
def plan(gpu_memory: int | None, **engine: Any) -> int:
    """Tell what fits before anything is loaded: bytes by cause, and what to change."""
    from quire.cluster.config import resolve
    from quire.cluster.plan import make_plan, render
    from quire.worker.host import available_memory

    if gpu_memory is not None and engine["device"] == "auto":
        engine["device"] = "cuda"
    with _mistakes():
        resolved = resolve(_engine_config(load_format="dummy", **engine))
        made = make_plan(resolved, gpu_memory, available_memory() if resolved.device == "cpu" else None)
    for line in (render(made), *made.engine.notes):
        click.echo(line)
    return 1 if made.fits is False else 0


@cli.command()
@click.argument("prompt")
@url_option
@sampling_options
@option("--n", type=int, help="Answers: independent samples, or the best of more; shown one after the other.")
@option("--logprobs", type=int, help="Show every token's log-probability, and those of the k likeliest, on stderr.")
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
def generate(prompt: str, url: str, no_stream: bool, **sampling: Any) -> None:
    """Continue PROMPT; - reads it from standard input."""
    with _client(url) as client:
        if prompt == "-":
            prompt = sys.stdin.read()
        responses = _watch_logprobs(client.generate(prompt, **sampling))
        if sampling["n"] is not None and sampling["n"] > 1:
            _print_samples(responses)
        else:
            _print_text(responses, stream=not no_stream)


@cli.command()
@url_option
@option("--system", help="The system prompt.")
@sampling_options
def chat(url: str, system: str | None, **sampling: Any) -> None:
    """Talk to the model: /reset forgets, /exit ends. From a pipe, every line is a message."""
    history = [] if system is None else [{"role": "system", "content": system}]
    beginning = list(history)
    interactive = sys.stdin.isatty()
    with _client(url) as client:
        for line in _lines(interactive):
            match line.strip():
                case "":
                    continue
                case "/exit":
                    return
                case "/reset":
                    history = list(beginning)
                    continue
            history.append({"role": "user", "content": line})
            answer = _answer(client, history, interactive, sampling)
            if answer is None:
                history.pop()
            else:
                history.append({"role": "assistant", "content": answer})


@cli.command()
@url_option
def load(url: str) -> None:
    """Show how busy a server is and where its memory is."""
    from quire.cluster.load import render

    with _client(url) as client:
        click.echo(render(client.load()))


@cli.group()
def prefix() -> None:
    """Keep in memory what many prompts begin with."""


@prefix.command()
@click.argument("file")
@url_option
@click.option("--name", help="Instead of the file's own.")
@click.option("--cache-salt", help="Only for requests of this salt.")
def reserve(file: str, url: str, name: str | None, cache_salt: str | None) -> None:
    """Keep what FILE holds: text, or JSON that says more, as for serve --reserve-prefix."""
    from quire.cluster.prefixes import read_prefix

    with _mistakes():
        given = read_prefix(file)
    with _client(url) as client:
        salt = given.cache_salt if cache_salt is None else cache_salt
        reserved = client.reserve_prefix(given.name if name is None else name, given.content, salt)
        click.echo(f"{reserved.name}: {reserved.num_tokens} tokens")


@prefix.command()
@click.argument("name")
@url_option
def release(name: str, url: str) -> None:
    """Keep the prefix NAME no longer."""
    with _client(url) as client:
        client.release_prefix(name)


@prefix.command(name="list")
@url_option
def list_prefixes(url: str) -> None:
    """Show what is kept, and how often it was of use."""
    with _client(url) as client:
        for kept in client.prefixes():
            state = f"{kept.num_blocks} blocks, {kept.num_hits} hits" if kept.is_ready else "on its way"
            click.echo(f"{kept.name}: {kept.num_tokens} tokens, {state}")


def _answer(client: Client, history: list[dict[str, str]], interactive: bool, sampling: Any) -> str | None:
    """Print the answer. None where somebody is there to go on after a failure or after ^C."""
    from quire.cluster.client import ServerError

    pieces = []
    try:
        for text in client.chat(history, **sampling):
            pieces.append(text)
            _write(text)
    except ServerError as error:
        if not interactive:
            raise
        click.echo(f"quire: {error}", err=True)
        return None
    except KeyboardInterrupt:
        if not interactive:
            raise
        _write("\n")
        return None
    _write("\n")
    return "".join(pieces)


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  (gives input() its editing keys)

    while True:
        try:
            yield input("> ")
        except EOFError:
            _write("\n")
            return


# -- printing


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_text(responses: Iterator[pb.GenerateResponse], stream: bool) -> None:
    from quire.cluster.client import texts

    pieces = []
    for _, text in texts(responses):
        if stream:
            _write(text)
        else:
            pieces.append(text)
    _write("".join(pieces) + "\n")


def _print_samples(responses: Iterator[pb.GenerateResponse]) -> None:
    """Samples come interleaved: each is shown when all of them are there."""
    from quire.cluster.client import texts

    samples: dict[int, str] = {}
    for index, text in texts(responses):
        samples[index] = samples.get(index, "") + text
    for index in sorted(samples):
        _write(f"[{index}] {samples[index]}\n")


def _watch_logprobs(responses: Iterator[pb.GenerateResponse]) -> Iterator[pb.GenerateResponse]:
    for response in responses:
        yield response
        for position in response.output.logprobs:
            shown = [f"{candidate.token!r} {candidate.logprob:.4f}" for candidate in position.candidates]
            line = f"[{response.output.index}] {shown[0]} (rank {position.sampled_rank})  {'  '.join(shown[1:])}"
            click.echo(line.rstrip(), err=True)


# -- mistakes


def _engine_config(**engine: Any) -> EngineConfig:
    from quire.cluster.config import EngineConfig

    return EngineConfig(**engine)


def _launch(config: ServeConfig) -> int:
    from quire.cluster import ray_auth

    ray_auth.choose(config.address)
    try:
        from quire.cluster import launch
    except KeyboardInterrupt:
        return _INTERRUPTED
    try:
        return launch.serve(config)
    except (launch.LaunchError, ValueError) as error:
        # ValueErrors come from processes that have looked at the model or the machine: sentences for the user.
        click.echo(f"quire: {' '.join(str(error).split())}", err=True)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def _check_model(engine: EngineConfig) -> None:
    """What can be known now is said now, and not after the seconds that importing Ray takes."""
    from quire.cluster.config import resolve

    for note in resolve(engine).notes:
        click.echo(f"quire: note: {note}", err=True)


@contextmanager
def _mistakes() -> Iterator[None]:
    """Settings that cannot work and models that cannot be read are the user's to correct."""
    from quire.cluster.config import ConfigError
    from quire.worker.models.spec import ModelError

    try:
        yield
    except (ConfigError, ModelError) as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _client(url: str) -> Iterator[Client]:
    # grpc writes its own log lines to stderr; what matters of them is in its statuses.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from quire.cluster.client import Client, ServerError

    with Client(url) as client:
        try:
            yield client
        except ServerError as error:
            raise click.ClickException(str(error)) from error
        except ValueError as error:  # a number or a text that the wire has no room for
            raise click.UsageError(f"this cannot be sent: {error}") from error


def run(arguments: Sequence[str] | None = None) -> int:
    """The command's exit code."""
    try:
        result = cli.main(arguments, prog_name="quire", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f" (see {error.ctx.command_path} --help)"
        message = " ".join(error.format_message().split())
        click.echo(f"quire: {message}{hint}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED


def main() -> NoReturn:
    sys.exit(run())


if __name__ == "__main__":
    main()
