//! `logs`: an agent's output, as it came: stdout to stdout, stderr to stderr.

use std::io::{self, Write as _};

use fermata_protocol::agent::{AgentLogs, LogLine};
use fermata_protocol::{Target, UnixMillis};

use super::{Ended, one_agent};
use crate::cli::LogsArgs;
use crate::errors::Failure;
use crate::output::time::{parse_since, rfc3339_ns};
use crate::output::{Format, Output, Paint};
use crate::session::Session;

/// How long one question for more output stays open; the next one follows at once.
const POLL_MS: u64 = 20_000;

/// Runs `logs`.
pub fn logs(session: &mut Session, args: LogsArgs) -> Ended {
    let since = match &args.since {
        Some(text) => {
            let now = session.out.now();
            Some(parse_since(text, now).map_err(|e| Failure::usage(format!("--since: {e}")))?)
        }
        None => None,
    };
    let target = one_agent(session, &args.target)?;
    read(
        session,
        &target,
        &Reading { follow: args.follow, tail: args.tail, since, timestamps: args.timestamps, raw: args.raw },
    )?;
    Ok(0)
}

/// Shows an agent's whole output until it has ended.
pub fn follow(session: &mut Session, target: &Target) -> Result<(), Failure> {
    read(session, target, &Reading { follow: true, tail: None, since: None, timestamps: false, raw: false })
}

struct Reading {
    follow: bool,
    tail: Option<u64>,
    since: Option<UnixMillis>,
    timestamps: bool,
    raw: bool,
}

fn read(session: &mut Session, target: &Target, reading: &Reading) -> Result<(), Failure> {
    let mut cursor = None;
    let mut printer = Printer::new(reading.timestamps);
    loop {
        let first = cursor.is_none();
        let batch = session.call_lasting(&AgentLogs {
            target: target.clone(),
            tail: reading.tail.filter(|_| first),
            since: reading.since.filter(|_| first),
            // The first answer comes at once, so that what is there is seen at once.
            wait_ms: if reading.follow && !first { POLL_MS } else { 0 },
            cursor,
            raw: reading.raw,
        })?;
        for line in &batch.lines {
            printer.print(&mut session.out, line)?;
        }
        session.out.flush()?;
        // An agent that writes faster than it is read must not turn this into a follow.
        let present = session.out.now().0.saturating_mul(1_000_000);
        let caught_up = batch.lines.last().is_none_or(|line| line.at_ns > present);
        if batch.end || (!reading.follow && caught_up) {
            return Ok(());
        }
        cursor = Some(batch.cursor);
    }
}

/// Writes lines; knows whether the last one on a stream still goes on.
struct Printer {
    timestamps: bool,
    stdout_open: bool,
    stderr_open: bool,
}

impl Printer {
    fn new(timestamps: bool) -> Self {
        Self { timestamps, stdout_open: false, stderr_open: false }
    }

    fn print(&mut self, out: &mut Output, line: &LogLine) -> io::Result<()> {
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
        // In the order in which they came, as far as two streams allow.
        out.flush()?;
        io::stderr().write_all(text.as_bytes())
    }

    /// Fermata's own words stand on lines of their own, apart from the agent's output.
    fn print_note(&mut self, out: &mut Output, line: &LogLine) -> io::Result<()> {
        let stamp = if self.timestamps { rfc3339_ns(line.at_ns) + " " } else { String::new() };
        let end_of_line = if std::mem::take(&mut self.stderr_open) { "\n" } else { "" };
        out.flush()?;
        io::stderr().write_all(format!("{end_of_line}{stamp}-- {}\n", line.text).as_bytes())
    }
}
