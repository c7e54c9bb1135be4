//! Everything that reaches stdout: data for people, for programs (`--json`) or ids alone (`-q`).
//!
//! Messages (warnings, hints, progress) go to stderr; errors are printed by [`crate::errors`].

pub mod progress;
pub mod table;

use std::fmt::Display;
use std::io::{self, BufWriter, IsTerminal as _, Stdout, Write as _};

use fermata_protocol::UnixMillis;
use fermata_protocol::agent::AgentStatus;
use fermata_protocol::project::ProjectStatus;
use serde::Serialize;

pub use table::{Cell, Facts, Paint, Table, clean};

use crate::cli::{ColorChoice, Globals};

/// For whom the output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Human,
    /// For programs: the protocol's own fields, one object per line.
    Json,
    /// Ids only, one per line.
    Ids,
}

/// How much is collected before it is written: a thousand rows in a few writes.
const OUTPUT_BYTES: usize = 64 << 10;

/// Writes results to stdout.
#[derive(Debug)]
pub struct Output {
    format: Format,
    color: bool,
    width: Option<usize>,
    now: UnixMillis,
    stdout: BufWriter<Stdout>,
}

impl Output {
    /// Looks at the flags, the environment and the terminal.
    pub fn new(globals: &Globals) -> Self {
        let terminal = io::stdout().is_terminal();
        let format = if globals.json {
            Format::Json
        } else if globals.quiet {
            Format::Ids
        } else {
            Format::Human
        };
        let color = match globals.color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => {
                let refused = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
                let dumb = std::env::var_os("TERM").is_some_and(|v| v == "dumb");
                terminal && !refused && !dumb
            }
        };
        let width = if terminal { terminal_size::terminal_size().map(|(width, _)| usize::from(width.0)) } else { None };
        Self {
            format,
            color,
            width,
            now: crate::units::now(),
            stdout: BufWriter::with_capacity(OUTPUT_BYTES, io::stdout()),
        }
    }

    /// Returns for whom the output is.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Says whether the output is for people.
    pub fn is_human(&self) -> bool {
        self.format == Format::Human
    }

    /// Says whether colours are on.
    pub fn color(&self) -> bool {
        self.color
    }

    /// Writes how long ago a time was.
    pub fn ago(&self, at: UnixMillis) -> String {
        crate::units::ago(at, self.now)
    }

    /// Returns the time at which the command began.
    pub fn now(&self) -> UnixMillis {
        self.now
    }

    /// Writes text as it is.
    pub fn text(&mut self, text: &str) -> io::Result<()> {
        self.stdout.write_all(text.as_bytes())
    }

    /// Writes a line.
    pub fn line(&mut self, line: impl Display) -> io::Result<()> {
        writeln!(self.stdout, "{line}")
    }

    /// Writes an object as one line of JSON.
    pub fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.stdout, value)?;
        self.stdout.write_all(b"\n")
    }

    /// Writes a table.
    pub fn table(&mut self, table: &Table) -> io::Result<()> {
        let text = table.render(self.width, self.color);
        self.text(&text)
    }

    /// Writes facts.
    pub fn facts(&mut self, facts: &Facts) -> io::Result<()> {
        let text = facts.render(self.color);
        self.text(&text)
    }

    /// Writes a list: one JSON line per row, ids, or a table (`nothing` to stderr when it is empty).
    pub fn rows<T: Serialize, I: Display>(
        &mut self,
        rows: &[T],
        nothing: &str,
        id: impl Fn(&T) -> I,
        table: impl FnOnce(&Self, &[T]) -> Table,
    ) -> io::Result<()> {
        match self.format {
            Format::Json => rows.iter().try_for_each(|row| self.json(row)),
            Format::Ids => rows.iter().try_for_each(|row| self.line(id(row))),
            Format::Human if rows.is_empty() => {
                note(nothing);
                Ok(())
            }
            Format::Human => {
                let table = table(self, rows);
                self.table(&table)
            }
        }
    }

    /// Writes one object: as JSON, as its id (nothing when it has none), or as people want it.
    pub fn one<T: Serialize>(
        &mut self,
        value: &T,
        id: Option<String>,
        human: impl FnOnce(&mut Self, &T) -> io::Result<()>,
    ) -> io::Result<()> {
        match self.format {
            Format::Json => self.json(value),
            Format::Ids => match id {
                Some(id) => self.line(id),
                None => Ok(()),
            },
            Format::Human => human(self, value),
        }
    }

    /// Writes one object for programs and one sentence for people.
    pub fn said<T: Serialize>(&mut self, value: &T, sentence: impl Display) -> io::Result<()> {
        self.one(value, None, |out, _| out.line(clean(&sentence.to_string())))
    }

    /// Tells warnings on stderr, after the data that they are about.
    pub fn warnings(&mut self, warnings: &[String]) -> io::Result<()> {
        self.flush()?;
        for warning in warnings {
            note(&format!("warning: {warning}"));
        }
        Ok(())
    }

    /// Hands everything to the reader.
    pub fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()
    }
}

/// Tells something on stderr that is neither data nor an error.
pub fn note(text: &str) {
    // There is no third place to complain when stderr is closed.
    let _ = writeln!(io::stderr(), "{}", clean(text)).is_ok();
}

/// Paints an agent's status.
pub fn agent_status(status: AgentStatus) -> Cell {
    let paint = match status {
        AgentStatus::Starting | AgentStatus::Running => Paint::Good,
        AgentStatus::WaitingForInput
        | AgentStatus::Paused
        | AgentStatus::Backoff
        | AgentStatus::Stopping
        | AgentStatus::Interrupted => Paint::Attention,
        AgentStatus::Failed | AgentStatus::TimedOut => Paint::Bad,
        AgentStatus::Exited => Paint::Dim,
    };
    Cell::painted(status.as_str(), paint)
}

/// Paints a project's status.
pub fn project_status(status: ProjectStatus) -> Cell {
    let paint = match status {
        ProjectStatus::Active => Paint::Good,
        ProjectStatus::Pausing | ProjectStatus::Paused | ProjectStatus::Resuming | ProjectStatus::Restoring => {
            Paint::Attention
        }
        ProjectStatus::Failed => Paint::Bad,
        ProjectStatus::Stopped | ProjectStatus::Completed => Paint::Dim,
        ProjectStatus::Init | ProjectStatus::Planning => Paint::Plain,
    };
    Cell::painted(status.as_str(), paint)
}
