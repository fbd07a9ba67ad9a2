#!/usr/bin/env bash
# Makes docs/images/verify.png of the top of a verification's page; needs Chromium:
#     python -m mnist_dist.verify strategy=mirrored strategy.num_replicas=2 data=mnist data.path=... run_dir=runs/picture
#     docs/make_verify_picture.sh runs/picture [HEIGHT]
set -euo pipefail

page=$(realpath "${1:?the run folder of a verification}")/verify.html
chromium --headless --no-sandbox --hide-scrollbars --force-device-scale-factor=1 --blink-settings=preferredColorScheme=1 \
    --window-size="1200,${2:-1120}" --screenshot="$(dirname "$0")/images/verify.png" "file://$page"
