//! The table of one agent: `[agents.NAME]`.

use std::path::{Path, PathBuf};

use fermata_protocol::supervision::Dependency;

use super::model::DeclaredAgent;
use super::section::{Located, Section, nearest};
use super::{environment, supervision};

/// Reads an agent, and its dependencies with their locations; `None` when it has no valid command.
pub fn read(mut table: Section<'_>, workspace: &Path) -> (Option<DeclaredAgent>, Vec<Located<Dependency>>) {
    let argv = table.command("command");
    // A misspelt 'comand' is reported as such, not also as missing.
    let misspelt = |name: &String| nearest(name, &["command"]).is_some();
    if !table.members().keys().any(misspelt) {
        let span = table.span();
        table.problem_with_hint(
            &span,
            "command",
            format!("'{}' is missing", table.path_of("command")),
            "write command = \"program and arguments\", or a list of words",
        );
    }
    let cwd = directory(&mut table, workspace);
    let env = environment::read(&mut table, workspace);
    let profile = table.text("profile").map(|profile| profile.value);
    let resume_argv = table.command("resume_command");
    let stop_grace_ms = table.duration("stop_grace").map(|grace| grace.value);
    let (supervision, depends_on) = supervision::read(&mut table);
    table.finish();
    let agent = argv.map(|argv| DeclaredAgent { argv, cwd, env, profile, resume_argv, stop_grace_ms, supervision });
    (agent, depends_on)
}

/// Reads the working directory: relative to the workspace and inside it, or absolute.
fn directory(table: &mut Section<'_>, workspace: &Path) -> PathBuf {
    let Some(cwd) = table.text("cwd") else { return workspace.to_owned() };
    let given = Path::new(&cwd.value);
    let full = match workspace.join(given).canonicalize() {
        Ok(full) => full,
        Err(error) => {
            let why = match error.kind() {
                std::io::ErrorKind::NotFound => "does not exist".to_owned(),
                _ => format!("cannot be used: {error}"),
            };
            table.problem(&cwd.span, "cwd", format!("the directory {} {why}", workspace.join(given).display()));
            return workspace.to_owned();
        }
    };
    if !full.is_dir() {
        table.problem(&cwd.span, "cwd", format!("{} is not a directory", full.display()));
    } else if !given.is_absolute() && !full.starts_with(workspace) {
        table.problem_with_hint(
            &cwd.span,
            "cwd",
            format!("\"{}\" leads outside the workspace, to {}", cwd.value, full.display()),
            "write an absolute path if that is intended",
        );
    }
    full
}
