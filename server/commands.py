"""The verbs this package adds to the `hub` command."""

from __future__ import annotations

from hub.commands import Command

COMMANDS: tuple[Command, ...] = (
    Command("serve", "server.cli:serve", "Serve one base with any mix of adapters over gRPC.", "Serving"),
    Command("generate", "server.client_cli:generate", "Ask a running server, streaming the answer.", "Serving"),
    Command("feedback", "server.client_cli:feedback", "Tell a server what an answer was worth.", "Serving"),
    Command("adapters", "server.client_cli:adapters", "Which adapters a running server holds, and where.", "Serving"),
    Command("merge", "server.merge_cli:merge", "Merge a version into a full-precision copy of its base.", "Serving"),
    Command(
        "export", "server.export_cli:export", "Write versions to a file or Hugging Face, or for llama.cpp.", "Sharing"
    ),
    Command("bench", "server.bench_cli:bench", "Put load on a running server and measure it.", "Serving"),
)
