//! `logs`: an agent's output, as it came: stdout to stdout, stderr to stderr.

use std::io::{self, Write as _};

use fermata_protocol::agent::{AgentLogs, LogLine};
use fermata_protocol::{RunId, Target, UnixMillis};

use super::{Ended, one_agent};
use crate::cli::LogsArgs;
use crate::errors::Failure;
use crate::output::{Format, Output, Paint};
use crate::session::Session;
use crate::units::{now, parse_since, rfc3339_ns};

/// How long one question for more output stays open; the next one follows at once.
const POLL_MS: u64 = 20_000;

/// Runs `logs`.
pub fn logs(session: &mut Session, args: LogsArgs) -> Ended {
    let since = match &args.since {
        Some(text) => {
            let began = session.out.now();
            Some(parse_since(text, began).map_err(|e| Failure::usage(format!("--since: {e}")))?)
        }
        None => None,
    };
    let target = one_agent(session, &args.target)?;
    read(
        session,
        &target,
        &Reading {
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

/// Shows an agent's whole output until it has ended.
pub fn follow(session: &mut Session, target: &Target) -> Result<(), Failure> {
    read(session, target, &Reading { follow: true, ..Reading::default() })
}

#[derive(Default)]
struct Reading {
    follow: bool,
    tail: Option<u64>,
    since: Option<UnixMillis>,
    run: Option<RunId>,
    runs_back: u32,
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
            run: reading.run.clone(),
            runs_back: reading.runs_back,
            raw: reading.raw,
        })?;
        for line in &batch.lines {
            printer.print(&mut session.out, line)?;
        }
        session.out.flush()?;
        let (began, present) = (session.out.now(), now());
        let caught_up = batch.lines.last().is_none_or(|line| is_new(line, began, present));
        if batch.end || (!reading.follow && caught_up) {
            return Ok(());
        }
        cursor = Some(batch.cursor);
    }
}

/// Says whether a line was written after the command began: an agent that writes faster than it is
/// read must not turn this into a follow. A line of the future was written before the clock was set
/// back, so that it is an old one, and more may follow it.
fn is_new(line: &LogLine, began: UnixMillis, present: UnixMillis) -> bool {
    let at_ms = line.at_ns.div_euclid(1_000_000);
    began.0 < at_ms && at_ms <= present.0
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
        assert!(!at(999) && !at(1_000), "it was there");
        assert!(at(1_001) && at(1_200));
        assert!(!at(1_201) && !at(3_600_000), "the clock was set back since");
    }
}
