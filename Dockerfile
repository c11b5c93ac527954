# A recipe; no image is published. docker build -t d2surgery . && docker run --rm -v "$PWD":/work d2surgery demo
FROM python:3.11-slim

COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt /src && rm -r /src

WORKDIR /work
ENTRYPOINT ["d2surgery"]
CMD ["--help"]
