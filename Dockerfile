# One image for all roles: `docker run payready worker`. A role's command is its line in the Procfile.
# Build: docker build --tag payready .

FROM python:3.11-slim-bookworm AS build
ARG REQUIREMENTS=requirements.txt
WORKDIR /build
COPY ${REQUIREMENTS} requirements.txt
# The environment has no pip. Every package is a wheel that is locked by its hash, so the build compiles nothing.
RUN python -m venv --without-pip /venv \
    && pip --python /venv/bin/python install --no-cache-dir --disable-pip-version-check \
        --only-binary :all: --require-hashes --requirement requirements.txt
COPY pyproject.toml Procfile /app/
COPY config /app/config
COPY cli /app/cli
COPY dashboard /app/dashboard
COPY demo /app/demo
COPY migrations /app/migrations
COPY tasks /app/tasks
COPY webhook /app/webhook
COPY worker /app/worker
COPY deploy/role deploy/healthy deploy/payready /venv/bin/
# The image is read-only at run time. Without this step Python would compile the code again at every start.
RUN python -m compileall -q /venv /app

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="payready" \
      org.opencontainers.image.licenses="MIT"
RUN pip uninstall --yes --quiet --root-user-action ignore pip setuptools wheel
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    PAYREADY_ENV=production \
    PAYREADY_WEBHOOK_HOST=0.0.0.0 \
    PAYREADY_DASHBOARD_HOST=0.0.0.0 \
    PAYREADY_METRICS_HOST=0.0.0.0 \
    PAYREADY_METRICS_PORT=9100
USER 10001:10001
EXPOSE 8000 8080 9100 5555
ENTRYPOINT ["role"]
CMD ["web"]
# For web, worker, refresh, beat and dashboard. `release` and `flower` need another check, or none.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 CMD ["healthy", "9100", "/healthz"]
