"""The `quire` command. A user's mistake is one line on stderr and an exit code, never a traceback.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Every command imports what it needs when it runs: talking
to a server must not wait for Ray or torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from quire.cluster.cli_options import BYTES, COUNT, engine_options, option, options, sampling_options, url_option

if TYPE_CHECKING:
    from quire.cluster.client import Client
    from quire.cluster.config import EngineConfig, ServeConfig
    from quire.protos import generation_pb2 as pb

_INTERRUPTED = 130


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
    option("--run-ahead", type=int, help="Steps sent ahead of the one that is awaited.  [default: 1; on a CPU 0]"),
    option("--prefill-floor", type=int,
           help="Tokens of prompts that a step may always compute beside decodes, more as more decode or wait; 0: all"
                " that fit.  [default: 0; on a CPU 64]"),
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
           help="Keep what many prompts begin with: a file of text, or JSON that says more; may be repeated."),
    option("--record", metavar="FILE", help="Write what the scheduler is told and decides, for replay."),
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
    record: str | None,
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
            record=None if record is None else os.path.abspath(record),
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
@click.argument("trace")
@options(
    option("--model", required=True, metavar="SHAPE", help="opt-13b, llama-3.1-8b, … (any other name lists them)."),
    option("--gpu", required=True, metavar="NAME", help="a100-40gb, a100-80gb, h100, h200."),
    option("--gpus", type=int, help="GPUs that share the model.  [default: 1, 2, 4 and 8]"),
    option("--rate", type=float, help="Requests per second.  [default: the largest that keeps the limit]"),
    option("--limit", type=float, default=0.1, help="Mean latency of a request divided by its tokens, seconds."),
    option("--duration", type=float, default=60.0, help="Seconds of arrivals to simulate."),
    option("--block-size", type=int, default=16, help="Tokens of a KV block."),
    option("--max-num-seqs", type=int, default=256, help="Sequences that run at once."),
    option("--max-num-batched-tokens", type=COUNT, default=2048, help="Tokens of the largest step."),
    option("--gpu-memory-utilization", type=float, default=0.9, help="Share of a GPU's memory to use."),
    option("--seed", type=int, default=0, help="Of lengths and arrivals that are drawn."),
)  # fmt: skip
def simulate(**question: Any) -> None:
    """Tell what a model on GPUs would serve of TRACE, without having them: a CSV file with columns arrival_s,
    prompt_tokens and output_tokens, or one of sharegpt, alpaca, azure, wmt16, drawn to published means. A latency
    above --limit is marked with !."""
    from quire.cluster.simulate_command import Question
    from quire.cluster.simulate_command import simulate as lines

    with _mistakes():
        for line in lines(Question(**question)):
            click.echo(line)


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


@cli.command()
@click.argument("request_id", metavar="REQUEST")
@url_option
def explain(request_id: str, url: str) -> None:
    """Tell the life of a request, by its id: what it waited for, what was computed, who had it preempted."""
    from quire.cluster.inspect_commands import explanation_lines

    with _client(url) as client:
        for line in explanation_lines(client.explain(request_id)):
            click.echo(line)


@cli.command()
@click.argument("file")
@options(
    click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
                 help="Decide with this setting instead, such as watermark=0.05; may be given several times."),
    click.option("--explain", "request_id", metavar="REQUEST", help="Tell the life of this request instead."),
)  # fmt: skip
def replay(file: str, settings: tuple[str, ...], request_id: str | None) -> int:
    """Let the scheduler decide again what serve --record FILE has recorded, and show where it decides otherwise."""
    from quire.cluster.inspect_commands import replay_lines

    with _mistakes():
        lines, code = replay_lines(file, settings, request_id)
    for line in lines:
        click.echo(line)
    return code


@cli.group()
def prefix() -> None:
    """Keep in memory what many prompts begin with."""


@prefix.command()
@click.argument("file")
@url_option
@click.option("--name", help="Instead of the file's own.")
@option("--cache-salt", help="Only for requests of this salt.")
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
