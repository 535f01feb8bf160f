"""Streams text from a Baton router over gRPC.

    python examples/grpc_generate.py 127.0.0.1:8200 "What is a generator?" --max-tokens 60 --n 2

A router with tenants needs a key: set BATON_API_KEY.
"""

from __future__ import annotations

import argparse
import os
import sys

import grpc

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("address", help="host:port of a router")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--n", type=int, default=1, help="answers to make")
    args = parser.parse_args()

    # 1) The request. Unset fields have the defaults given in proto/batonpb/.
    sampling = common_pb2.SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature)
    if args.seed is not None:
        sampling.seed = args.seed
    request = inference_pb2.GenerateRequest(text=args.prompt, sampling=sampling, n=args.n, ttft_slo_ms=30_000)

    # 2) The call, with the tenant's key if there is one. Leaving the loop early would cancel it.
    key = os.environ.get("BATON_API_KEY")
    metadata = (("authorization", f"Bearer {key}"),) if key else None
    texts = [""] * args.n
    with grpc.insecure_channel(args.address) as channel:
        try:
            for response in inference_pb2_grpc.InferenceStub(channel).Generate(request, metadata=metadata):
                # 3) Pieces of text; those of several answers come interleaved.
                texts[response.index] += response.text
                if args.n == 1:
                    print(response.text, end="", flush=True)
                if response.finish_reason:
                    show_end(response, texts[response.index] if args.n > 1 else "")
        except grpc.RpcError as error:
            # 4) A refusal names the field and the limit, or says when to retry.
            hints = dict(error.trailing_metadata() or ())
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            if "retry-after-ms" in hints:
                print(f"try again in {hints['retry-after-ms']} ms", file=sys.stderr)
            return 1
    return 0


def show_end(last: inference_pb2.GenerateResponse, text: str) -> None:
    """Prints what only an answer's last response has."""
    reason = common_pb2.FinishReason.Name(last.finish_reason).removeprefix("FINISH_REASON_").lower()
    usage = f"{last.usage.prompt_tokens} + {last.usage.output_tokens} tokens, {last.usage.cached_tokens} cached"
    print(f"{text}\n[{last.index}: {reason}; {usage}; first token after {last.timeline.first_token_s:.3f} s]")


if __name__ == "__main__":
    sys.exit(main())
