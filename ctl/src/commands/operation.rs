//! `op …`.

use std::io;

use fermata_protocol::operation::{OperationCancel, OperationList, OperationShow, OperationState, OperationView};

use super::pause::steps_text;
use crate::cli::groups::OperationCommand;
use crate::errors::CommandResult;
use crate::output::{Cell, FieldList, Paint, Printer, TextTable};
use crate::session::DaemonSession;
use crate::units::duration;

pub fn run(session: &mut DaemonSession, command: OperationCommand) -> CommandResult {
    let operation = match command {
        OperationCommand::Ls { project, limit } => {
            let operations = session.call(&OperationList { project, limit })?.operations;
            let id = |op: &OperationView| op.id.clone();
            session.out.rows(&operations, "no operations", id, table)?;
            return Ok(0);
        }
        OperationCommand::Show { operation } => session.call(&OperationShow { operation_id: operation })?,
        OperationCommand::Cancel { operation } => session.call(&OperationCancel { operation_id: operation })?,
    };
    let id = operation.id.to_string();
    session.out.object(&operation, Some(id), print_operation)?;
    Ok(0)
}

fn state(operation: &OperationView) -> Cell {
    let paint = match operation.state {
        OperationState::Running | OperationState::Undoing => Paint::Attention,
        OperationState::Succeeded => Paint::Good,
        OperationState::Failed => Paint::Bad,
        OperationState::Cancelled => Paint::Dim,
    };
    Cell::painted(operation.state.as_str(), paint)
}

fn elapsed(operation: &OperationView, out: &Printer) -> String {
    let end = operation.ended_at.unwrap_or(out.now());
    duration(end.since(operation.started_at) as f64)
}

fn table(out: &Printer, operations: &[OperationView]) -> TextTable {
    let mut table = TextTable::new(&["OPERATION", "PROJECT", "KIND", "STATE", "STEP", "STARTED", ">DURATION"]);
    for operation in operations {
        table.row([
            Cell::from(operation.id.as_str()),
            operation.project.as_str().into(),
            operation.kind.as_str().into(),
            state(operation),
            operation.step.as_deref().unwrap_or("").into(),
            out.ago(operation.started_at).into(),
            elapsed(operation, out).into(),
        ]);
    }
    table
}

fn print_operation(out: &mut Printer, operation: &OperationView) -> io::Result<()> {
    let error = operation.error.as_ref();
    let fields = FieldList::default()
        .add("operation", operation.id.as_str())
        .add("project", operation.project.as_str())
        .add("kind", operation.kind.as_str())
        .add("state", state(operation))
        .add_some("step", operation.step.as_ref())
        .add("started", out.ago(operation.started_at))
        .add("duration", elapsed(operation, out))
        .add_some("steps", steps_text(&operation.steps_ms))
        .add_some("result", operation.result.as_ref().map(|r| r.to_string()))
        .add_some("error", error.map(|e| Cell::painted(format!("{} ({})", e.message, e.data.code), Paint::Bad)))
        .add_some("hint", error.and_then(|e| e.data.hint.as_ref()));
    out.fields(&fields)
}
