# The app on a CPU: docker build -t perdure . && docker run -p 7860:7860 -e PERDURE_TOKEN=secret -v ~/learners:/data perdure
FROM python:3.12-slim
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY packages packages
RUN pip install --no-cache-dir ./packages/perdure-pocket '.[app,demo,mllm]'
WORKDIR /data
VOLUME /data
EXPOSE 7860
# Listens to other machines, so that lessons and uploads ask for the token in PERDURE_TOKEN.
CMD ["perdure", "app", "/data/my.learner", "--host", "0.0.0.0"]
