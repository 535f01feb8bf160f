"""A conversation with a Baton router over gRPC, in which the model may call a function of this program.

    python examples/grpc_chat.py 127.0.0.1:8200            # the model's chat template must know tools, or: --no-tools

Each line is a turn; an empty line or the end of input ends it. A router with tenants needs a key: set BATON_API_KEY.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import zoneinfo

import grpc

from batonpb import inference_pb2, inference_pb2_grpc

MAX_ROUNDS = 4  # of calls and their results, before it is the user's turn again
PARAMETERS = {
    "type": "object",
    "properties": {"zone": {"type": "string", "description": 'Of the IANA database, such as "Europe/Zurich".'}},
    "required": ["zone"],
}
TIME = inference_pb2.Tool(name="get_time", description="The time in a zone.", parameters=json.dumps(PARAMETERS))


def get_time(zone: str) -> str:
    return datetime.datetime.now(zoneinfo.ZoneInfo(zone)).isoformat(timespec="seconds")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("address", help="host:port of a router")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--no-tools", action="store_true")
    args = parser.parse_args()
    key = os.environ.get("BATON_API_KEY")
    metadata = (("authorization", f"Bearer {key}"),) if key else None
    request = inference_pb2.GenerateRequest(sampling={"max_tokens": args.max_tokens})
    if not args.no_tools:
        request.chat.tools.append(TIME)
    with grpc.insecure_channel(args.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for line in sys.stdin:
            if not line.strip():
                break
            request.chat.messages.add(role="user", content=line.strip())
            try:
                for _ in range(MAX_ROUNDS):
                    if not take_turn(stub, request, metadata):
                        break
            except grpc.RpcError as error:
                print(f"{error.code().name}: {error.details()}", file=sys.stderr)
                return 1
    return 0


def take_turn(
    stub: inference_pb2_grpc.InferenceStub,
    request: inference_pb2.GenerateRequest,
    metadata: tuple[tuple[str, str], ...] | None,
) -> bool:
    """Adds the model's next turn to the conversation. Returns whether it called tools, and so continues."""
    turn = inference_pb2.ChatMessage(role="assistant")
    for response in stub.Generate(request, metadata=metadata):
        print(response.text, end="", flush=True)
        turn.content += response.text
        turn.tool_calls.extend(response.tool_calls)
    print()
    request.chat.messages.append(turn)
    for call in turn.tool_calls:
        result = answer(call)
        print(f"({call.name}{call.arguments} = {result})")
        request.chat.messages.add(role="tool", name=call.name, tool_call_id=call.id, content=result)
    return bool(turn.tool_calls)


def answer(call: inference_pb2.ToolCall) -> str:
    """The result of the called function. A model may name any function with any arguments, so they are checked here."""
    try:
        if call.name != TIME.name:
            raise LookupError(f"there is no {call.name}")
        return get_time(**json.loads(call.arguments))
    except Exception as error:
        return f"error: {error}"


if __name__ == "__main__":
    sys.exit(main())
