"""What the gateway makes of the controller's messages: token ids become text, stop strings end it.

Nothing is passed on but in order: a gap or a repetition is an error, never a false finish. A sample ends with the token
that completes a stop string. A ranked answer is whole when it comes: it is cut there, and keeps the score that it was
ranked by.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from quire.cluster.errors import RequestError
from quire.cluster.text import SampleText, Tokenizer
from quire.protos import generation_pb2 as pb


class Answers:
    """All samples, or all ranked answers, of one request on their way to the client."""

    def __init__(self, request: pb.GenerateRequest, ids: Sequence[int], tokenizer: Tokenizer | None) -> None:
        """`ids`: the prompt's."""
        self._sampling = request.sampling
        self._tokenizer = tokenizer
        # A completion goes on where the prompt ends; an answer in a conversation begins a text of its own.
        self._before = () if request.WhichOneof("prompt") == "conversation" else tuple(ids[-16:])
        self._samples: dict[int, _Sample] = {}
        self._unfinished = request.sampling.n if request.sampling.HasField("n") else 1
        self._cut = False

    @property
    def is_cut_short(self) -> bool:
        """Every sample has ended, and not all of them upstream, where they would go on."""
        return self._unfinished == 0 and self._cut

    def check_complete(self) -> None:
        """Raises RequestError."""
        if self._unfinished:
            raise RequestError(grpc.StatusCode.INTERNAL, "the controller ended the stream before the request's end")

    def take(self, message: pb.GenerateResponse) -> list[pb.GenerateResponse]:
        """What to send for one message from upstream. Raises RequestError."""
        kind = message.WhichOneof("event")
        event = message.output if kind == "output" else message.finished
        sample = self._samples.get(event.index)
        if sample is None:
            sample = self._samples[event.index] = _Sample(self._sampling, self._before, self._tokenizer)
        if sample.is_finished:  # by a stop string, of which the controller does not know
            return []
        if event.seq != sample.num_received:
            raise RequestError(
                grpc.StatusCode.INTERNAL,
                f"sample {event.index}: token {event.seq} from the controller where {sample.num_received} is next",
            )
        if kind == "finished":
            sample.finish(message.finished)
            self._unfinished -= 1
            return [message]
        if not sample.take(message.output):
            return []
        if sample.stop is None or self._is_ranked:
            return [message]
        sample.is_finished = True
        self._unfinished -= 1
        self._cut = True
        finished = pb.Finished(
            index=event.index, seq=sample.num_sent, reason=pb.FINISH_REASON_STOP, stop_string=sample.stop
        )
        return [message, pb.GenerateResponse(finished=finished)]

    @property
    def _is_ranked(self) -> bool:
        """Its answers come whole: their ends come too, with their scores, where a stop string cuts them."""
        sampling = self._sampling
        return sampling.HasField("beam_width") or sampling.best_of > max(sampling.n, 1)


class _Sample:
    """One sample: how far it is, and its text on the way."""

    def __init__(self, sampling: pb.SamplingParams, before: Sequence[int], tokenizer: Tokenizer | None) -> None:
        self.num_received = 0
        """Tokens from the controller."""
        self.num_sent = 0
        """Of them, those up to the end of its text."""
        self.stop: str | None = None
        """The stop string that has ended its text."""
        self.is_finished = False
        self._tokenizer = tokenizer
        if tokenizer is not None:
            self._text = SampleText(
                tokenizer,
                stops=tuple(sampling.stop),
                include_stop=sampling.include_stop_str_in_output,
                stop_token_ids=sampling.stop_token_ids,
                min_tokens=sampling.min_tokens,
                skip_special_tokens=not sampling.HasField("skip_special_tokens") or sampling.skip_special_tokens,
                context=before,
            )

    def take(self, output: pb.Output) -> bool:
        """Add the text, cut after the token that completes a stop string. False: its text had ended before."""
        self.num_received += len(output.token_ids)
        if self.stop is not None:
            return False
        if self._tokenizer is not None:
            self._add_text(output, self._tokenizer)
        self.num_sent += len(output.token_ids)
        return True

    def _add_text(self, output: pb.Output, tokenizer: Tokenizer) -> None:
        text = []
        for count, token_id in enumerate(output.token_ids, start=1):
            piece, self.stop = self._text.feed(token_id)
            text.append(piece)
            if self.stop is not None:
                del output.token_ids[count:]
                del output.logprobs[count:]
                break
        output.text = "".join(text)
        for position in output.logprobs:
            for candidate in position.candidates:
                candidate.token = tokenizer.token_text(candidate.token_id)

    def finish(self, finished: pb.Finished) -> None:
        """The controller's end: release what was held back, or put the stop string's end in its place."""
        self.is_finished = True
        if self._tokenizer is not None and self.stop is None:
            finished.text, self.stop = self._text.finish()
        if self.stop is not None:
            finished.seq = self.num_sent
            finished.reason = pb.FINISH_REASON_STOP
            finished.stop_string = self.stop
