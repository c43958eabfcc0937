# The service in a container: Vertex AI, SageMaker, Lambda (with another command) and anywhere else. See nbs/06c_clouds.ipynb.
#   docker build -t scimlora .
#   docker run --read-only --tmpfs /tmp --cap-drop ALL -p 8080:8080 scimlora
# Not built or run by this project's CI, which has no container runtime.
FROM python:3.12-slim AS build
WORKDIR /build
COPY . .
# torch's builds for CUDA are gigabytes; TORCH_INDEX may name an index with CPU builds.
ARG TORCH_INDEX=""
RUN python -m venv /opt/scimlora \
 && /opt/scimlora/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt ".[lambda]"

FROM python:3.12-slim
COPY --from=build /opt/scimlora /opt/scimlora
RUN useradd --uid 1000 --no-create-home --shell /usr/sbin/nologin scimlora
USER 1000
WORKDIR /tmp
# Nothing is written but temporary files of uploads: the file system may be read-only with a tmpfs at /tmp.
ENV PATH=/opt/scimlora/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TMPDIR=/tmp HOME=/tmp
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
 CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ.get('AIP_HTTP_PORT') or os.environ.get('SCIMLORA_PORT') or 8080}/healthz\", timeout=2)"]
# SageMaker adds the argument `serve`.
ENTRYPOINT ["python", "-c", "from scimlora.clouds import main; main()"]
