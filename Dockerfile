# Images of Procession: docker build --target agent|collector .
# The binaries come from "make dist" (static, one folder per architecture), so
# that building needs no base image and no network.

FROM scratch AS agent
ARG TARGETARCH=amd64
ARG VERSION=unknown
LABEL org.opencontainers.image.title="procession-agent" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY dist/linux-${TARGETARCH}/agent /agent
# Root: the kernel's process connector, BPF and other users' /proc entries need
# capabilities. The pod drops all but a few.
ENTRYPOINT ["/agent"]
CMD ["run"]

FROM scratch AS collector
ARG TARGETARCH=amd64
ARG VERSION=unknown
LABEL org.opencontainers.image.title="procession-collector" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# With the command line tool, for kubectl exec.
COPY dist/linux-${TARGETARCH}/collector dist/linux-${TARGETARCH}/procession /
USER 65532:65532
ENTRYPOINT ["/collector"]
CMD ["serve"]
