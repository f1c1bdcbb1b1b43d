"""What coordinator and site agree on: study, learning plan, models, imaging, metrics, wire. Knows nothing of either.

Two libraries read their settings from the environment when they are first imported, so they are set here, where every
entry point passes.
"""

import os
import sys

# gRPC: TLS 1.3 only; see common/wire/channel.py. Where gRPC is loaded already it would be too late, and must show.
if "grpc" not in sys.modules:
    os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES256-GCM-SHA384")

# TensorFlow: errors of the devices it looks for and does not find are not the user's.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
