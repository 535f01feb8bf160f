"""`baton generate` and `baton chat`: send text to a router and stream its answer to the terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator

import grpc
from google.protobuf.message import Message

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc
from deploy.channel import ClientTls, add_tls_arguments, open_channel, tls_from
from deploy.config import DeployError
from deploy.state import StateDir, add_state_argument
from router.validate import MAX_ANSWERS

API_KEY_VARIABLE = "BATON_API_KEY"
NEEDS_TLS = "the routers have TLS: name their authority with --tls-ca FILE, or a well-known one with --tls"


class RequestFailed(DeployError):
    """The router refused a request, or it failed; names the gRPC status."""

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """A connection to one router, "host:port". Use as a context manager. A router with tenants needs an API key."""

    def __init__(self, address: str, api_key: str = "", tls: ClientTls | None = None) -> None:
        """Raises `DeployError` for TLS files that cannot be read."""
        self._channel = open_channel(address, tls)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else None
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def model(self) -> inference_pb2.GetModelResponse:
        """Raises `RequestFailed`."""
        try:
            model: inference_pb2.GetModelResponse = self._stub.GetModel(
                inference_pb2.GetModelRequest(), timeout=10.0, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise _failed(error) from None
        return model

    def explain(self, request_id: str) -> inference_pb2.ExplainResponse:
        """Raises `RequestFailed`; NOT_FOUND if this router has no such request."""
        request = inference_pb2.ExplainRequest(request_id=request_id)
        try:
            answer: inference_pb2.ExplainResponse = self._stub.Explain(request, timeout=10.0, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _failed(error) from None
        return answer

    def stream(self, request: inference_pb2.GenerateRequest) -> Iterator[inference_pb2.GenerateResponse]:
        """The answers as they come; closing the iterator cancels the request. Raises `RequestFailed`."""
        call = self._stub.Generate(request, metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise _failed(error) from None
        finally:
            call.cancel()


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from; - reads standard input")
    parser.add_argument(
        "--json", action="store_true", help="print JSON at the end in place of the text: an object, or a list of --n"
    )
    parser.add_argument(
        "--n", type=int, default=1, metavar="INT", help="answers to make; more than one are printed whole"
    )
    parser.add_argument("--echo", action="store_true", help="print the prompt in front of each answer")
    _add_request_arguments(parser)


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message before the first turn")
    _add_request_arguments(parser)


def generate(args: argparse.Namespace) -> int:
    prompt = _read_prompt() if args.prompt == "-" else args.prompt
    request = request_from(args)
    request.echo = args.echo
    if not 1 <= args.n <= MAX_ANSWERS:
        raise DeployError(f"--n must be from 1 to {MAX_ANSWERS}, got {args.n}")
    request.n = args.n
    try:
        request.text = prompt
    except ValueError:
        raise DeployError("the prompt is not valid UTF-8") from None
    with connect(args) as client:
        responses = list(show(client.stream(request), silent=args.json or args.n > 1))
    answers = [[response for response in responses if response.index == index] for index in range(max(1, args.n))]
    if args.json:
        print(json.dumps(as_json(answers[0]) if len(answers) == 1 else [as_json(answer) for answer in answers]))
    elif len(answers) > 1:
        for index, answer in enumerate(answers):
            print(f"--- answer {index}", "".join(response.text for response in answer), sep="\n")
    return 0


def _read_prompt() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise DeployError("the prompt is not valid UTF-8") from None


def chat(args: argparse.Namespace) -> int:
    """A conversation, turn by turn. Ctrl-C cuts an answer short and drops its turn; Ctrl-D or /quit ends."""
    with connect(args) as client:
        model = client.model()
        if not model.has_chat_template:
            raise DeployError(f"{model.model} has no chat template; use `baton generate`")
        request = request_from(args)
        if args.system:
            request.chat.messages.add(role="system", content=args.system)
        while (line := _read_turn()) is not None:
            if line.strip():
                _turn(client, request, line)
    return 0


def _turn(client: Client, request: inference_pb2.GenerateRequest, line: str) -> None:
    """Sends the conversation so far and `line`; on success, `line` and the answer are added to `request`."""
    request.chat.messages.add(role="user", content=line)
    responses = client.stream(request)
    try:
        answer = "".join(response.text for response in show(responses))
        request.chat.messages.add(role="assistant", content=answer)
    except (KeyboardInterrupt, RequestFailed) as error:
        del request.chat.messages[-1]
        print(f"\nbaton: {error or 'cut short'}; this turn is forgotten", file=sys.stderr)
    finally:
        responses.close()  # type: ignore[attr-defined]  # a generator: cancels the call


def _read_turn() -> str | None:
    try:
        line = input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line.strip() == "/quit" else line


def show(
    responses: Iterator[inference_pb2.GenerateResponse], silent: bool = False
) -> Iterator[inference_pb2.GenerateResponse]:
    """Passes responses on, and writes their text to the terminal on the way."""
    for response in responses:
        if not silent:
            sys.stdout.write(response.text)
            sys.stdout.flush()
        yield response
    if not silent:
        print(flush=True)


def as_json(responses: list[inference_pb2.GenerateResponse]) -> dict[str, object]:
    """One whole answer: text, tokens, and the fields of its last message."""
    last = responses[-1]
    usage = {field.name: getattr(last.usage, field.name) for field in last.usage.DESCRIPTOR.fields}
    timeline = {field.name: getattr(last.timeline, field.name) for field in last.timeline.DESCRIPTOR.fields}
    return {
        "request_id": last.request_id,
        "text": "".join(response.text for response in responses),
        "token_ids": [token.token_id for response in responses for token in response.tokens],
        "finish_reason": common_pb2.FinishReason.Name(last.finish_reason).removeprefix("FINISH_REASON_").lower(),
        "usage": usage,
        "timeline": timeline,
    }


def connect(args: argparse.Namespace) -> Client:
    """The router, key and TLS of a command's options. Raises `DeployError`."""
    return Client(address_from(args), api_key_from(args), tls_from(args))


def address_from(args: argparse.Namespace) -> str:
    """The given router, or the first one of the running cluster. Raises `DeployError`."""
    if args.address:
        return str(args.address)
    state = StateDir(args.state_dir).running()
    if not state.routers:
        raise DeployError("the cluster is still starting")
    if state.has_tls and tls_from(args) is None:
        raise DeployError(NEEDS_TLS)
    return state.routers[0]


def api_key_from(args: argparse.Namespace) -> str:
    """The given key, or the environment's; "" is none. Raises `DeployError`, which does not repeat it."""
    return checked_key(args.api_key or os.environ.get(API_KEY_VARIABLE, ""))


def checked_key(text: str) -> str:
    """A key that can be sent. Raises `DeployError`, which does not repeat it."""
    key = text.strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise DeployError("the API key must be printable ASCII without spaces")
    return key


def request_from(args: argparse.Namespace) -> inference_pb2.GenerateRequest:
    """The request without its prompt. Raises `DeployError` for values no message can hold; routers check ranges."""
    request = inference_pb2.GenerateRequest(sampling=sampling_from(args))
    _fill(request, args, LIMITS)
    return request


def sampling_from(args: argparse.Namespace) -> common_pb2.SamplingParams:
    """The sampling options. Raises `DeployError` for values no message can hold; routers check ranges."""
    sampling = common_pb2.SamplingParams(ignore_eos=args.ignore_eos)
    _fill(sampling, args, SAMPLING)
    return sampling


def _fill(message: Message, args: argparse.Namespace, names: Iterable[str]) -> None:
    """Sets these fields from the options that were given."""
    for name in names:
        if (value := getattr(args, name)) is not None:
            try:
                message.MergeFrom(type(message)(**{name: value}))
            except (ValueError, TypeError) as error:
                raise DeployError(f"--{name.replace('_', '-')}: {error}") from None


LIMITS = {
    "ttft_slo_ms": "refuse the request where its first token is predicted to take longer",
    "tpot_slo_ms": "refuse it where each further token is predicted to take longer",
    "priority": "from -100 to 100; the smaller one is computed first (default 0)",
}
SAMPLING: dict[str, tuple[type, str]] = {  # the defaults are those of common.proto
    "temperature": (float, "from 0, always the likeliest token, to 2 (default 1)"),
    "top_k": (int, "of so many likeliest tokens alone (default 0: all)"),
    "top_p": (float, "of the likeliest ones that have this share together (default 1: all)"),
    "min_p": (float, "of those with this share of the likeliest one's probability (default 0: all)"),
    "repetition_penalty": (float, "above 1: tokens of prompt and answer become less likely (default 1)"),
    "presence_penalty": (float, "from -2 to 2: above 0, tokens of the answer become less likely (default 0)"),
    "frequency_penalty": (float, "likewise, for each time that they came (default 0)"),
    "seed": (int, "the same one gives the same answer (default: a random one)"),
    "max_tokens": (int, "of the answer at most (default: what the model's length leaves)"),
    "min_tokens": (int, "before it may end (default 0)"),
    "stop": (str, "ends the answer; can be repeated"),
}


def add_router_arguments(parser: argparse.ArgumentParser) -> None:
    """Which router, and who asks."""
    parser.add_argument(
        "--address", default="", metavar="HOST:PORT", help="of a router; default: of the cluster that is up"
    )
    parser.add_argument(
        "--api-key", default="", metavar="KEY", help=f"of a tenant; default: the variable {API_KEY_VARIABLE}"
    )
    add_tls_arguments(parser)
    add_state_argument(parser)


def _add_request_arguments(parser: argparse.ArgumentParser) -> None:
    add_router_arguments(parser)
    for name, words in LIMITS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, metavar="INT", help=words)
    for name, (kind, words) in SAMPLING.items():
        option = "--" + name.replace("_", "-")
        if name == "stop":
            parser.add_argument(option, action="append", metavar="TEXT", help=words)
        else:
            parser.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=words)
    parser.add_argument("--ignore-eos", action="store_true", help="go on where the model would end")


def _failed(error: grpc.RpcError) -> RequestFailed:
    return RequestFailed(f"{error.code().name}: {error.details()}", error.code())  # a call's error is the call
