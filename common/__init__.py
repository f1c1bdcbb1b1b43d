"""What coordinator and site agree on: study, learning plan, models, imaging, metrics, wire. Knows nothing of either.

Libraries read their settings when they are first imported, so they are set here, where every entry point passes.
"""

import os
import sys
import warnings

# gRPC: TLS 1.3 only; see common/wire/channel.py. Where gRPC is loaded already it would be too late, and must show.
TLS12_SUITES_VARIABLE = "GRPC_SSL_CIPHER_SUITES"
TLS12_SUITES = "ECDHE-RSA-AES256-GCM-SHA384"
if "grpc" not in sys.modules:
    os.environ.setdefault(TLS12_SUITES_VARIABLE, TLS12_SUITES)

# TensorFlow: errors of the devices it looks for and does not find are not the user's.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# On processors without VNNI, bfloat16 or AMX instructions it would leave oneDNN off: on an AMD EPYC with AVX2 a step of
# the 3D U-Net then took ten times as long, one of the 2D U-Net twice.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

# What these libraries would say on the terminal is not for the user: gRPC's raw words on a failed handshake (ours
# follow) and a note to the authors of one of their dependencies.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
