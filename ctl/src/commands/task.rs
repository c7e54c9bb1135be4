//! `task …`.

use fermata_protocol::Target;
use fermata_protocol::task::{TaskList, TaskPut, TaskStatus, TaskView};

use crate::cli::groups::TaskCommand;
use crate::errors::CommandResult;
use crate::output::{Cell, Paint, TextTable};
use crate::session::DaemonSession;
use crate::terminal_text::clean;

pub fn run(session: &mut DaemonSession, command: TaskCommand) -> CommandResult {
    match command {
        TaskCommand::Ls { project } => {
            let tasks = session.call(&TaskList { project })?.tasks;
            let id = |task: &TaskView| task.id;
            session.out.rows(&tasks, "no tasks", id, |out, tasks| {
                let mut table = TextTable::new(&[">N", "STATUS", ">DONE", "AGENT", "CHANGED", "TITLE"]);
                for task in tasks {
                    let percent = task.percent.map(|percent| format!("{percent:.0}%"));
                    table.row([
                        task.id.to_string().into(),
                        status(task.status),
                        percent.unwrap_or_default().into(),
                        task.agent.as_ref().map_or("", |a| a.as_str()).into(),
                        out.ago(task.updated_at).into(),
                        Cell::from(&task.title),
                    ]);
                }
                table
            })?;
            Ok(0)
        }
        TaskCommand::Add { target, title, state } => put(
            session,
            TaskPut {
                target: Some(target),
                id: None,
                title: Some(title),
                status: state.status,
                percent: state.percent,
            },
        ),
        TaskCommand::Set { task, title, state } => put(
            session,
            TaskPut {
                target: task.project.map(Target::project),
                id: Some(task.id),
                title,
                status: state.status,
                percent: state.percent,
            },
        ),
    }
}

/// Creates or changes a task and prints it.
pub fn put(session: &mut DaemonSession, params: TaskPut) -> CommandResult {
    let task = session.call(&params)?;
    let word = if params.id.is_some() { "changed" } else { "added" };
    let id = task.id.to_string();
    session.out.object(&task, Some(id), |out, task| {
        let line = format!("task {} {word}: {} ({})", task.id, task.title, task.status.as_str());
        out.line(clean(&line))
    })?;
    Ok(0)
}

fn status(status: TaskStatus) -> Cell {
    let paint = match status {
        TaskStatus::Pending => Paint::Plain,
        TaskStatus::InProgress | TaskStatus::Completed => Paint::Good,
        TaskStatus::WaitingForInput => Paint::Attention,
        TaskStatus::Failed => Paint::Bad,
        TaskStatus::Cancelled => Paint::Dim,
    };
    Cell::painted(status.as_str(), paint)
}
