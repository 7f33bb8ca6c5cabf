# A gRPC client in another language: reads ["Method", {request}] per line, prints {"ok": …} or {"code", "details"}.
#   kudo_client.py DIRECTORY_OF_GENERATED_CODE TARGET
import json
import sys

import grpc

sys.path.insert(0, sys.argv[1])
import network_pb2  # noqa: E402
import network_pb2_grpc  # noqa: E402

stub = network_pb2_grpc.NetworkStub(grpc.insecure_channel(sys.argv[2]))
for line in sys.stdin:
    method, fields = json.loads(line)
    request = getattr(network_pb2, method + "Request")(**fields)
    try:
        answer = getattr(stub, method)(request, timeout=20)
        out = {"ok": {field.name: value for field, value in answer.ListFields()}}
    except grpc.RpcError as error:
        out = {"code": error.code().name, "details": error.details()}
    print(json.dumps(out), flush=True)
