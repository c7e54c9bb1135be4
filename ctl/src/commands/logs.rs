//! `logs`: the output of an agent, its stdout to stdout and its stderr to stderr.

use std::io::{self, Write as _};

use fermata_protocol::agent::{AgentLogs, LogLine};
use fermata_protocol::{RunId, Target, UnixMillis};

use super::arguments::one_agent;
use crate::cli::LogsArgs;
use crate::errors::{CommandError, CommandResult};
use crate::output::{Format, Paint, Printer};
use crate::session::DaemonSession;
use crate::units::{now, parse_since, rfc3339_ns};

/// How long the daemon may wait for more output before it answers a request.
const POLL_MS: u64 = 20_000;

pub fn logs(session: &mut DaemonSession, args: LogsArgs) -> CommandResult {
    let since = match &args.since {
        Some(text) => {
            let began = session.out.now();
            Some(parse_since(text, began).map_err(|e| CommandError::usage(format!("--since: {e}")))?)
        }
        None => None,
    };
    let target = one_agent(session, &args.target)?;
    read(
        session,
        &target,
        &LogQuery {
            follow: args.follow,
            tail: args.tail,
            since,
            run: args.run,
            runs_back: u32::from(args.previous),
            timestamps: args.timestamps,
            raw: args.raw,
        },
    )?;
    Ok(0)
}

/// Prints the complete output of an agent until it has ended.
pub fn follow(session: &mut DaemonSession, target: &Target) -> Result<(), CommandError> {
    read(session, target, &LogQuery { follow: true, ..LogQuery::default() })
}

#[derive(Default)]
struct LogQuery {
    follow: bool,
    tail: Option<u64>,
    since: Option<UnixMillis>,
    run: Option<RunId>,
    runs_back: u32,
    timestamps: bool,
    raw: bool,
}

fn read(session: &mut DaemonSession, target: &Target, query: &LogQuery) -> Result<(), CommandError> {
    let mut cursor = None;
    let mut printer = LogPrinter::new(query.timestamps);
    loop {
        let first = cursor.is_none();
        let batch = session.call_across_restarts(&AgentLogs {
            target: target.clone(),
            tail: query.tail.filter(|_| first),
            since: query.since.filter(|_| first),
            // The first request does not wait: existing output is shown immediately.
            wait_ms: if query.follow && !first { POLL_MS } else { 0 },
            cursor,
            run: query.run.clone(),
            runs_back: query.runs_back,
            raw: query.raw,
        })?;
        for line in &batch.lines {
            printer.print(&mut session.out, line)?;
        }
        session.out.flush()?;
        let (began, present) = (session.out.now(), now());
        let caught_up = batch.lines.last().is_none_or(|line| is_new(line, began, present));
        if batch.end || (!query.follow && caught_up) {
            return Ok(());
        }
        cursor = Some(batch.cursor);
    }
}

/// Says whether a line was written after the command began, where output without `--follow` ends: otherwise an agent
/// that writes faster than it is read would never let the command end. A line with a time in the future was written
/// before the clock was set back, and is an old one.
fn is_new(line: &LogLine, began: UnixMillis, present: UnixMillis) -> bool {
    let at_ms = line.at_ns.div_euclid(1_000_000);
    began.0 < at_ms && at_ms <= present.0
}

/// Prints lines, and remembers for each stream whether its last line is still incomplete.
struct LogPrinter {
    timestamps: bool,
    stdout_open: bool,
    stderr_open: bool,
}

impl LogPrinter {
    fn new(timestamps: bool) -> Self {
        Self { timestamps, stdout_open: false, stderr_open: false }
    }

    fn print(&mut self, out: &mut Printer, line: &LogLine) -> io::Result<()> {
        if out.format() == Format::Json {
            return out.json(line);
        }
        if !matches!(&line.stream[..], "stdout" | "stderr") {
            return self.print_note(out, line);
        }
        let to_stdout = line.stream == "stdout";
        let open = if to_stdout { &mut self.stdout_open } else { &mut self.stderr_open };
        let mut text = String::new();
        if self.timestamps && !*open {
            let stamp = rfc3339_ns(line.at_ns);
            text.push_str(&Paint::Dim.apply(&stamp, out.color()));
            text.push(' ');
        }
        text.push_str(&line.text);
        if !line.partial {
            text.push('\n');
        }
        *open = line.partial;
        if to_stdout {
            return out.text(&text);
        }
        // Keeps the order of the two streams as far as possible.
        out.flush()?;
        io::stderr().write_all(text.as_bytes())
    }

    /// Prints a note of Fermata itself on a line of its own.
    fn print_note(&mut self, out: &mut Printer, line: &LogLine) -> io::Result<()> {
        let stamp = if self.timestamps { rfc3339_ns(line.at_ns) + " " } else { String::new() };
        let end_of_line = if std::mem::take(&mut self.stderr_open) { "\n" } else { "" };
        out.flush()?;
        io::stderr().write_all(format!("{end_of_line}{stamp}-- {}\n", line.text).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_line_between_the_beginning_and_the_present_is_new() {
        let at = |at_ms: i64| {
            let line =
                LogLine { at_ns: at_ms * 1_000_000, stream: "stdout".into(), text: String::new(), partial: false };
            is_new(&line, UnixMillis(1_000), UnixMillis(1_200))
        };
        assert!(!at(999) && !at(1_000), "written before");
        assert!(at(1_001) && at(1_200));
        assert!(!at(1_201) && !at(3_600_000), "the clock was set back");
    }
}
